"""What would we write, and in which order? Tokens, and a score to rank positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dlmlib.decoding.canvas import Canvas
from dlmlib.device import uniform
from dlmlib.errors import check
from dlmlib.model.lazy_logits import LazyLogits, by_chunks

SAMPLING_CHUNK = 2**19  # entries of float64 noise alive at once: 4 MiB


@dataclass
class Proposal:
    """One candidate token for every open position; N of them, or spread over [B, T].

    Fields:
        token: the candidate.
        logprob: its log-probability under the clean logits (no temperature).
        score: rank of the position; the highest is committed first.
        entropy: nats of the position's distribution; None unless a policy asked.
    """

    token: Tensor
    logprob: Tensor
    score: Tensor
    entropy: Tensor | None = None

    def within(self, open_: Tensor) -> "Proposal":
        """The same over [B, T], with everything but the open positions out of reach."""
        entropy = self.entropy
        return Proposal(
            self.token,
            self.logprob.masked_fill(~open_, -torch.inf),
            self.score.masked_fill(~open_, -torch.inf),
            None if entropy is None else entropy.masked_fill(~open_, torch.inf),
        )

    def spread(self, open_: Tensor) -> "Proposal":
        """From N rows to [B, T]; closed positions score -inf."""

        def put(values, fill):
            full = values.new_full(open_.shape, fill)
            full[open_] = values
            return full

        entropy = None if self.entropy is None else put(self.entropy, torch.inf)
        return Proposal(
            put(self.token, 0),
            put(self.logprob, -torch.inf),
            put(self.score, -torch.inf),
            entropy,
        )


def sample(
    logits: Float[Tensor, "N V"],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " N"]:
    """Draw from softmax(logits / temperature); the arg max at temperature 0.

    Gumbel-max in float64: argmax_v logits_v - T log(-log u_v). In float32 the noise is
    too coarse and lowers the temperature in effect.

    Source: Zheng et al. (arXiv 2409.02908), section 4. Introduced in notebook 03.
    """
    if temperature == 0:
        return logits.argmax(-1)
    rows = max(1, SAMPLING_CHUNK // logits.shape[-1])
    drawn = []
    for part in logits.split(rows):
        u = uniform(part.shape, generator, part.device, torch.float64)
        noise = u.log().neg_().log_()  # in place: float64 copies are dear
        drawn.append(noise.mul_(-temperature).add_(part).argmax(-1))
    return torch.cat(drawn) if drawn else logits.new_empty(0, dtype=torch.long)


class Propose:
    """Ranks the open positions. Subclasses say how; `needs_entropy` asks for it."""

    needs_entropy = False

    def reads(self, canvas: Canvas, rows: Int[Tensor, " b"]) -> Tensor | None:
        """Columns [b, T] whose final states the order needs; by default none."""
        return None

    def order(self, logits: LazyLogits, canvas: Canvas, rows, region) -> Tensor:
        """Rank [b, T] from the states of the columns it `reads`, instead of `score`."""
        raise NotImplementedError

    def score(self, logits, token, logprob, entropy, columns, generator) -> Tensor:
        """Rank [N]; the highest is committed first.

        Args:
            logits: clean [N, V].
            token: proposed [N].
            logprob: of these tokens [N].
            entropy: [N] if `needs_entropy`.
            columns: canvas column of each position [N].
            generator: source of random ranks.
        """
        raise NotImplementedError


class Confidence(Propose):
    """The most probable token first (LLaDA's "low confidence remasking").

    Args:
        last: tokens that come after all others however sure they are, such as those
            that end a text. Where another token is proposed, its rank is its
            probability among the tokens that are not `last`.
    Source: LLaDA (arXiv 2502.09992), algorithm 5, and its confidence_eos_eot_inf;
    MaskGIT. Introduced in notebook 03.
    """

    def __init__(self, last: Sequence[int] = ()):
        self.last = list(last)

    def score(self, logits, token, logprob, entropy, columns, generator):
        if not self.last:
            return logprob
        last = torch.tensor(self.last, device=logits.device)
        total = (logits.gather(1, token[:, None])[:, 0] - logprob).double()
        ending = (logits[:, last] - total[:, None]).exp().sum(1)
        score = logprob - (1 - ending).clamp_min(1e-300).log()
        return score.masked_fill(
            torch.isin(token, last), torch.finfo(torch.float32).min
        )


class Margin(Propose):
    """The clearest lead first: p(best) - p(second best).

    Source: Dream's topk_margin; Kim et al. (arXiv 2502.06768). Introduced in
    notebook 03.
    """

    def score(self, logits, token, logprob, entropy, columns, generator):
        top = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, True)).exp()
        return top[:, 0] - top[:, 1]


class NegEntropy(Propose):
    """The least uncertain position first: sum_v p_v log p_v.

    Source: Dream's entropy; EB-Sampler (arXiv 2505.24857). Introduced in notebook 03.
    """

    needs_entropy = True

    def score(self, logits, token, logprob, entropy, columns, generator):
        return -entropy


class Random(Propose):
    """Uniformly random order: the order that the training objective averages over.

    Source: MDLM (arXiv 2406.07524). Introduced in notebook 03.
    """

    def score(self, logits, token, logprob, entropy, columns, generator):
        return uniform(token.shape, generator, token.device, torch.float64)


class LeftToRight(Propose):
    """The leftmost open position first, as an autoregressive model writes."""

    def score(self, logits, token, logprob, entropy, columns, generator):
        return -columns.double()


class RightToLeft(Propose):
    """The rightmost open position first."""

    def score(self, logits, token, logprob, entropy, columns, generator):
        return columns.double()


NAMED = {
    "confidence": Confidence,
    "margin": Margin,
    "entropy": NegEntropy,
    "random": Random,
    "left_to_right": LeftToRight,
    "right_to_left": RightToLeft,
}


def named(propose: str | Propose) -> Propose:
    """The policy itself, or the one of that name.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(propose, Propose):
        return propose
    check(propose in NAMED, "propose", propose, f"a policy or one of {sorted(NAMED)}")
    return NAMED[propose]()


def proposals(
    policy: Propose,
    logits: Float[Tensor, "N V"] | LazyLogits,
    columns: Int[Tensor, " N"],
    mask_token_id: int,
    temperature: float = 0.0,
    with_entropy: bool = False,
    generator: torch.Generator | None = None,
    suppress: Int[Tensor, " n"] | None = None,
) -> Proposal:
    """Candidate tokens and ranks for N open positions.

    [MASK] is never proposed: a written mask would be no progress. Log-probability and
    entropy are those of the clean softmax, whatever the temperature; suppressed tokens
    are out of it, as if the model could not say them. A few positions are worked on at
    a time, so that memory does not grow with their number.
    """
    options = mask_token_id, temperature, with_entropy, generator, suppress

    def some(logits: Tensor, columns: Tensor) -> Proposal:
        return proposals_of(policy, logits, columns, *options)

    return joined(by_chunks(some, logits, columns))


def proposals_of(
    policy: Propose,
    logits: Float[Tensor, "n V"],
    columns: Int[Tensor, " n"],
    mask_token_id: int,
    temperature: float,
    with_entropy: bool,
    generator: torch.Generator | None,
    suppress: Int[Tensor, " n"] | None,
) -> Proposal:
    """`proposals` of some of the positions."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if suppress is not None:
        logits = logits.index_fill(1, suppress, -torch.inf)
    total = logits.logsumexp(-1)
    entropy = None
    if with_entropy or policy.needs_entropy:
        entropy = entropies(logits, total)
    if mask_token_id < logits.shape[-1]:
        logits = logits.index_fill(
            1, torch.tensor(mask_token_id, device=logits.device), -torch.inf
        )
    token = sample(logits, temperature, generator)
    logprob = logits.gather(1, token[:, None])[:, 0] - total
    score = policy.score(logits, token, logprob, entropy, columns, generator)
    return Proposal(token, logprob, score.double(), entropy)


def entropies(logits: Float[Tensor, "n V"], total: Tensor) -> Float[Tensor, " n"]:
    """-sum_v p_v log p_v, where 0 log 0 = 0; `total` is the logits' logsumexp."""
    log_p = logits - total[:, None]
    return -log_p.exp().mul_(log_p).nan_to_num_(0.0).sum(-1)


def joined(parts: list[Proposal]) -> Proposal:
    """The proposals of several parts as one."""
    if len(parts) == 1:
        return parts[0]
    entropy = [part.entropy for part in parts]
    return Proposal(
        torch.cat([part.token for part in parts]),
        torch.cat([part.logprob for part in parts]),
        torch.cat([part.score for part in parts]),
        None if entropy[0] is None else torch.cat(entropy),
    )
