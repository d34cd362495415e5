"""Log-likelihood of an answer: Monte Carlo for real models, enumeration for toys."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from dlmlib.diffusion.objective import NELBO
from dlmlib.errors import check
from dlmlib.model.call import logits_at, mask_token_of


@torch.no_grad()
def log_likelihood(
    model,
    prompt_ids: Int[Tensor, " P"],
    answer_ids: Int[Tensor, " L"],
    samples: int = 128,
    batch_size: int = 16,
    times: str = "l_of_L",
    mask_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Monte Carlo lower bound of log p(answer | prompt), in nats.

    log p(a | q) >= -E_l E_{x_l} [ (L / l) sum_{hidden} -log p(a^i | q, x_l) ]

    Args:
        model: maps input_ids to `.logits`.
        prompt_ids: the condition, never hidden; may be empty.
        answer_ids: what is scored.
        samples: corrupted copies; evenly spaced in l within each batch.
        batch_size: copies per forward.
        times: estimator, see `NELBO`.
        mask_token_id: default the model's own.
        generator: source of the draws.
    Returns:
        nats; at most 0 for models that give [MASK] no probability.
    Raises:
        ValueError: for an empty answer or fewer than one sample.
    Source: LLaDA (arXiv 2502.09992), eq. 6 and its get_log_likelihood. Introduced in
    notebook 02.
    """
    check(samples >= 1, "samples", samples, "an integer >= 1")
    check(batch_size >= 1, "batch_size", batch_size, "an integer >= 1")
    check(answer_ids.numel() >= 1, "answer_ids", answer_ids, "at least one token")
    objective = NELBO(mask_token_of(model, mask_token_id), times=times)
    ids = torch.cat([prompt_ids, answer_ids])
    maskable = torch.arange(len(ids), device=ids.device) >= len(prompt_ids)
    total = 0.0
    for first in range(0, samples, batch_size):
        rows = min(batch_size, samples - first)
        batch = {
            "input_ids": ids.expand(rows, -1),
            "maskable": maskable.expand(rows, -1),
        }
        total += objective(model, objective.corrupt(batch, generator)).sum().item()
    return -total / samples


@torch.no_grad()
def exact_log_likelihood(
    model, input_ids: Int[Tensor, " L"], mask_token_id: int | None = None
) -> tuple[float, float]:
    """log p(x) of the random-order sampler and its bound, over all 2^L masked copies.

    With f(S) the chance to write the rest of x given the tokens S, and g(S) the
    expected nats of doing so, one token at a time in uniformly random order:
    f(S) = mean_{i not in S} p(x_i | x_S) f(S + i),
    g(S) = mean_{i not in S} [ -log p(x_i | x_S) + g(S + i) ].
    The NELBO is g(empty): by Jensen's inequality -log f(empty) <= g(empty), with
    equality when every order gives x the same probability, as an exact model does.

    Args:
        model: maps input_ids to `.logits`.
        input_ids: a sequence of at most 16 tokens.
        mask_token_id: default the model's own.
    Returns:
        (log f(empty), -g(empty)) in nats.
    Raises:
        ValueError: if the sequence is longer than 16.
    Source: the any-order view of masked diffusion, e.g. Ou et al. (arXiv 2406.03736).
    Introduced in notebook 01.
    """
    length = len(input_ids)
    check(1 <= length <= 16, "len(input_ids)", length, "within 1 … 16")
    mask = mask_token_of(model, mask_token_id)
    subsets = torch.arange(2**length, device=input_ids.device)[:, None]
    seen = (subsets >> torch.arange(length, device=input_ids.device)) % 2 == 1
    canvases = input_ids.expand(2**length, -1).masked_fill(~seen, mask)
    logits = logits_at(model, canvases, ~seen)
    rows, columns = (~seen).nonzero(as_tuple=True)
    nats = -logits.double().log_softmax(-1)[torch.arange(len(rows)), input_ids[columns]]
    step = nats.new_full(seen.shape, math.inf)  # [2^L, L], infinite where seen
    step[rows, columns] = nats
    log_f = nats.new_zeros(2**length)
    bound = nats.new_zeros(2**length)
    grown = subsets + 2 ** torch.arange(length, device=input_ids.device)  # S + i
    for size in reversed(range(length)):
        rows = (seen.sum(1) == size).nonzero()[:, 0]
        open_, after = ~seen[rows], grown[rows].clamp_max(2**length - 1)
        terms = (log_f[after] - step[rows]).masked_fill(~open_, -math.inf)
        log_f[rows] = terms.logsumexp(1) - math.log(length - size)
        cost = (bound[after] + step[rows]).masked_fill(~open_, 0.0)
        bound[rows] = cost.sum(1) / (length - size)
    return log_f[0].item(), -bound[0].item()
