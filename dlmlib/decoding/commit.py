"""How many of the proposed tokens do we keep?"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.canvas import Canvas
from dlmlib.decoding.propose import Proposal
from dlmlib.errors import check


class Commit:
    """Keeps the `quota` best-ranked positions of a row: as it stands, one a step.

    A schedule sets the quota. An adaptive rule keeps all positions that pass its test,
    and falls back on the best-ranked where these are fewer than the quota of one.
    """

    steps: int | None = None
    needs_entropy = False

    def quota(self, count: Int[Tensor, " B"], canvas: Canvas, steps, generator):
        """Tokens to keep in each row, given `count` open positions.

        `steps` [B] is what each row's phase may take in all, None for adaptive rules.
        """
        return torch.ones_like(count)

    def passing(self, proposal: Proposal, open_: Tensor) -> Bool[Tensor, "B T"] | None:
        """Positions that pass an adaptive rule; None for schedules."""
        return None

    def __call__(
        self, proposal: Proposal, open_: Bool[Tensor, "B T"], quota: Int[Tensor, " B"]
    ) -> Bool[Tensor, "B T"]:
        """Positions to write now; ties go to the left."""
        best = (ranks(proposal.score) < quota[:, None]) & open_
        passing = self.passing(proposal, open_)
        if passing is None:
            return best
        passing = passing & open_
        too_few = passing.sum(1) < quota
        return passing | (best & too_few[:, None])


def ranks(score: Float[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """0 for the highest score of a row, 1 for the next; ties in column order."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def by_rank(values: Float[Tensor, "B T"], descending: bool):
    """Values sorted along the row, and how to put results back in place."""
    ordered, index = values.sort(dim=1, descending=descending, stable=True)
    return ordered, index.argsort(dim=1)


class Even(Commit):
    """The same number at every step, the remainder first; 16 in 6: 3, 3, 3, 3, 2, 2.

    quota = ceil(open positions / steps left), with the steps shared by the blocks.

    Args:
        steps: step budget S of the whole decode.
    Raises:
        ValueError: if steps < 1.
    Source: LLaDA's get_num_transfer_tokens. Introduced in notebook 03.
    """

    def __init__(self, steps: int):
        check(isinstance(steps, int) and steps >= 1, "steps", steps, "an integer >= 1")
        self.steps = steps

    def quota(self, count, canvas, steps, generator):
        left = steps - canvas.phase_step
        return -(-count // left.clamp_min(1))


class Scheduled(Even):
    """Dream's time grid: of n masks keep int(n (1 - s/t)), all of them at the end.

    t and s are neighbours on linspace(1, eps, steps + 1).

    Args:
        steps: step budget S.
        eps: end of the grid, in (0, 1).
        stochastic: draw the number from Binomial(n, 1 - s/t) instead, which with
            `Random` is ancestral sampling of the reverse process (MDLM).
    Raises:
        ValueError: if steps < 1 or eps lies outside (0, 1).
    Source: Dream's diffusion_generate; MDLM (arXiv 2406.07524), eq. 6. Introduced in
    notebook 03.
    """

    def __init__(self, steps: int, eps: float = 1e-3, stochastic: bool = False):
        super().__init__(steps)
        check(0 < eps < 1, "eps", eps, "within (0, 1)")
        self.eps, self.stochastic = eps, stochastic

    def quota(self, count, canvas, steps, generator):
        total = steps.double()
        step = canvas.phase_step.double()
        t = 1 - (1 - self.eps) * step / total
        s = 1 - (1 - self.eps) * (step + 1) / total
        share = torch.where(step + 1 >= total, 1.0, 1 - s / t)
        if self.stochastic:
            source = generator.device if generator is not None else count.device
            drawn = torch.binomial(
                count.double().to(source), share.to(source), generator=generator
            )
            return drawn.to(count.device).long()
        return (count * share).long()


class Threshold(Commit):
    """Every token at least `threshold` probable; the best one if none is.

    Args:
        threshold: tau, in (0, 1].
    Raises:
        ValueError: if tau lies outside (0, 1].
    Source: Fast-dLLM (arXiv 2505.22618), section 3.3. Introduced in notebook 03.
    """

    def __init__(self, threshold: float = 0.9):
        check(0 < threshold <= 1, "threshold", threshold, "within (0, 1]")
        self.threshold = threshold

    def passing(self, proposal, open_):
        return proposal.logprob.exp() >= self.threshold


class Factor(Commit):
    """The largest n with (n + 1)(1 - c_n) < factor, c_n the n-th best probability.

    The rule behind it: n tokens may be written together when the weakest of them is
    sure enough for their joint arg max to be the arg max of each.

    Args:
        factor: f > 0; the theorem's own value is 1.
        fast_dllm_tail: as Fast-dLLM's program, also write the last open token of the
            block whenever all others pass (so two masks left always go together).
    Raises:
        ValueError: if f <= 0.
    Source: Fast-dLLM (arXiv 2505.22618), theorem 1 and section 3.3. Introduced in
    notebook 03.
    """

    def __init__(self, factor: float = 1.0, fast_dllm_tail: bool = False):
        check(factor > 0, "factor", factor, "> 0")
        self.factor, self.fast_dllm_tail = factor, fast_dllm_tail

    def passing(self, proposal, open_):
        best, back = by_rank(proposal.logprob.exp(), descending=True)
        n = torch.arange(1, best.shape[1] + 1, device=best.device)
        number = ((n + 1) * (1 - best) < self.factor).long().cumprod(1).sum(1)
        if self.fast_dllm_tail:
            last = number.clamp_min(1) == open_.sum(1) - 1
            number = torch.where(last, open_.sum(1), number)
        return (n <= number[:, None]).gather(1, back)


class EntropyBound(Commit):
    """The largest set, least uncertain first, with sum H - max H <= bound.

    sum H - max H bounds the total correlation, the price of writing the set at once.

    Args:
        bound: gamma in nats, >= 0.
    Raises:
        ValueError: if gamma < 0.
    Source: EB-Sampler (arXiv 2505.24857), eq. 8. Introduced in notebook 03.
    """

    needs_entropy = True

    def __init__(self, bound: float = 0.1):
        check(bound >= 0, "bound", bound, ">= 0 nats")
        self.bound = bound

    def passing(self, proposal, open_):
        entropy, back = by_rank(proposal.entropy, descending=False)
        # In rising order the largest is the last: the sum of those before it.
        before = entropy.cumsum(1) - entropy
        return (before.nan_to_num(torch.inf) <= self.bound).gather(1, back)
