"""The published decoders as keyword arguments: `decode(model, prompt, **preset)`.

Each says what its program does by default where that is right; quirks that are not are
named flags. Give `length` (and a generator, where something is drawn) yourself.
"""

from dlmlib.decoding import (
    Blocks,
    Confidence,
    DualCache,
    EarlyCommit,
    Even,
    Factor,
    PrefixCache,
    Remask,
    Scheduled,
    Threshold,
)
from dlmlib.errors import check

DREAM_ORDERS = {
    "origin": "random",
    "maskgit_plus": "confidence",
    "topk_margin": "margin",
    "entropy": "entropy",
}
CACHES = {"none": None, "prefix": PrefixCache, "dual": DualCache}


def llada(
    steps: int = 128,
    block_length: int = 32,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    eos_token_id: int = 126081,
    eot_token_id: int = 126348,
    **options,
) -> dict:
    """LLaDA's generate: blocks, an even schedule, the surest token first.

    Args:
        steps: step budget, shared by the blocks.
        block_length: equal to the answer's length for pure diffusion.
        logits_eos_inf: never write the end-of-text token.
        confidence_eos_eot_inf: write the ends of text and turn only where nothing else
            is left to write. (Upstream's program, when it samples, forgets the first.)
        eos_token_id: <|endoftext|>, which also fills the rest of an answer.
        eot_token_id: <|eot_id|>, which ends a turn.
        options: further arguments of `decode`, such as temperature or cfg_scale.
    Source: LLaDA (arXiv 2502.09992), algorithm 5 and appendix B.4. Introduced in
    notebook 06.
    """
    own = {"where": Blocks(block_length), "commit": Even(steps)}
    if logits_eos_inf:
        own["suppress_tokens"] = [eos_token_id]
    if confidence_eos_eot_inf:
        own["propose"] = Confidence(last=[eos_token_id, eot_token_id])
    return {**own, **options}


def dream(
    steps: int = 512, algorithm: str = "entropy", eps: float = 1e-3, **options
) -> dict:
    """Dream's diffusion_generate: its time grid and one of its four orders.

    Args:
        steps: step budget.
        algorithm: "origin" (ancestral: random order, a random number of tokens),
            "maskgit_plus", "topk_margin" or "entropy".
        eps: end of the time grid.
    Raises:
        ValueError: for another algorithm.
    Source: Dream (arXiv 2508.15487). Introduced in notebook 07.
    """
    known = sorted(DREAM_ORDERS)
    check(algorithm in DREAM_ORDERS, "algorithm", algorithm, f"one of {known}")
    commit = Scheduled(steps, eps, stochastic=algorithm == "origin")
    return {"propose": DREAM_ORDERS[algorithm], "commit": commit, **options}


def mdlm(steps: int = 128, **options) -> dict:
    """MDLM's ancestral sampler: masks are revealed with chance 1 - s/t, drawn at T = 1.

    Source: MDLM (arXiv 2406.07524), eq. 6. Introduced in notebook 03.
    """
    return dream(steps, "origin", temperature=1.0) | options


def fast_dllm(
    block_length: int = 32,
    threshold: float | None = 0.9,
    factor: float | None = None,
    cache: str = "dual",
    **options,
) -> dict:
    """Fast-dLLM's generate: blocks, a threshold or the factor rule, a cache.

    Args:
        block_length: tokens per block.
        threshold: tau; ignored when `factor` is given.
        factor: f, with the program's own treatment of the last token.
        cache: "none", "prefix" or "dual".
    Raises:
        ValueError: for another cache.
    Source: Fast-dLLM (arXiv 2505.22618). Introduced in notebook 08.
    """
    check(cache in CACHES, "cache", cache, f"one of {sorted(CACHES)}")
    rule = Threshold(threshold) if factor is None else Factor(factor, True)
    reuse = CACHES[cache]() if CACHES[cache] else None
    return {"where": Blocks(block_length), "commit": rule, "reuse": reuse, **options}


def prophet(
    steps: int = 256,
    block_length: int = 32,
    answer: slice = slice(-5, None),
    gaps: tuple[float, float, float] = (7.5, 5.0, 2.5),
    **options,
) -> dict:
    """Prophet: LLaDA's decoding that stops when the answer is settled.

    Args:
        steps: step budget.
        block_length: tokens per block.
        answer: columns of the answer.
        gaps: lead of the best logit needed early, in the middle and late.
    Source: Prophet (arXiv 2508.19982). Introduced in notebook 10.
    """
    return llada(steps, block_length, stop=EarlyCommit(answer, gaps)) | options


def remdm(steps: int = 128, rule: str = "cap", eta: float = 0.02, **options) -> dict:
    """ReMDM: random order, an even schedule, written tokens taken back by `rule`.

    Source: ReMDM (arXiv 2503.00307), section 4. Introduced in notebook 03.
    """
    revise = Remask(rule, eta)
    own = {"propose": "random", "commit": Even(steps), "revise": revise}
    return {**own, "temperature": 1.0, **options}
