"""The published estimators of log-probability: which copies, with what weight."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dlmlib.device import uniform
from dlmlib.errors import check
from dlmlib.rl.logprob import Estimator


def ones(hidden) -> Float[Tensor, "B K L"]:
    """Weight 1 on every hidden token."""
    return hidden.to(torch.get_default_dtype())


class MeanField(Estimator):
    """All tokens at once from a fully masked answer: sum_i log p(x_i | nothing).

    One forward. It is the exact log-probability of a decoder that writes everything in
    one step, and far from that of any other wherever tokens depend on one another.

    Args:
        prompt_mask: share of the prompt that is hidden too, drawn anew for each copy,
            which regularises several updates on one rollout.
    Raises:
        ValueError: for a share outside [0, 1).
    Source: d1's diffu-GRPO (arXiv 2504.12216), section 3. Introduced in notebook 18.
    """

    def __init__(self, prompt_mask: float = 0.15):
        check(0 <= prompt_mask < 1, "prompt_mask", prompt_mask, "within [0, 1)")
        self.prompt_mask = prompt_mask

    def plan(self, completion_ids, generator, commit_step):
        hidden = torch.ones_like(completion_ids, dtype=torch.bool)[:, None]
        return hidden, ones(hidden), 1 - self.prompt_mask


class Coupled(Estimator):
    """A mask and its complement, so that every token is scored once in a context.

    With one ratio t for the batch, M hides each token with chance t:
    term_i = ( log p(x_i | nothing) + w_i log p(x_i | the copy that hides i) ) / 2
    with w_i = 1/t if M hides i, else 1/(1-t), as the program has it. Three forwards.

    Args:
        low, high: range of t.
    Raises:
        ValueError: unless 0 < low <= high < 1.
    Source: DiffuCoder's coupled-GRPO (arXiv 2506.20639), section 4. Introduced in
    notebook 18.
    """

    def __init__(self, low: float = 0.2, high: float = 0.8):
        check(0 < low <= high < 1, "low, high", (low, high), "0 < low <= high < 1")
        self.low, self.high = low, high

    def plan(self, completion_ids, generator, commit_step):
        device = completion_ids.device
        t = self.low + (self.high - self.low) * uniform((1,), generator, device)
        return *complementary(
            uniform(completion_ids.shape, generator, device) < t, t
        ), 1


def complementary(mask, t):
    """(hidden, weight) of the three copies of `Coupled`, given its mask M [B, L]."""
    hidden = torch.stack([torch.ones_like(mask), mask, ~mask], dim=1)
    weight = torch.stack([torch.ones_like(t), 1 / t, 1 / (1 - t)]).view(1, 3, 1)
    return hidden, ones(hidden) * weight / 2


class ELBO(Estimator):
    """The evidence lower bound by Monte Carlo, with VRPO's split of the budget.

    log p(x) >= E_t E_{x_t} [ (1/t) sum_{hidden} log p(x_i | x_t) ], estimated with
    `times` values of t and `masks` copies for each: K = times * masks forwards. For a
    fixed K the variance is least with masks = 1.

    Args:
        times: values of t, spread evenly over (0, 1) by one shift.
        masks: copies for each t.
        count: hide exactly l of L tokens, weight L / l, rather than each with chance t.
        spread: False draws the values of t independently.
    Raises:
        ValueError: for fewer than one time or mask.
    Source: VRPO (arXiv 2505.19223), section 3; LLaDA (arXiv 2502.09992), eq. 6.
    Introduced in notebook 18.
    """

    eps = 1e-3  # smallest t: keeps the weight finite

    def __init__(
        self, times: int = 8, masks: int = 1, count: bool = True, spread: bool = True
    ):
        for name, value in (("times", times), ("masks", masks)):
            check(isinstance(value, int) and value >= 1, name, value, "an integer >= 1")
        self.times, self.masks = times, masks
        self.count, self.spread = count, spread

    def plan(self, completion_ids, generator, commit_step):
        device, (rows, length) = completion_ids.device, completion_ids.shape
        if self.spread:
            shift = uniform((rows, 1), generator, device)
            t = (shift + torch.arange(self.times, device=device) / self.times) % 1
        else:
            t = uniform((rows, self.times), generator, device)
        t = t.repeat_interleave(self.masks, dim=1)[..., None]  # [B, K, 1]
        draw = uniform((rows, t.shape[1], length), generator, device)
        if self.count:
            number = (t * length).long() + 1  # uniform in 1 … L
            hidden = draw.argsort(2).argsort(2) < number
            return hidden, ones(hidden) * length / number / t.shape[1], 1
        t = self.eps + (1 - self.eps) * t
        hidden = draw < t
        return hidden, ones(hidden) / t / t.shape[1], 1


class EUBO(ELBO):
    """An upper bound for answers that shall become less likely.

    Lowering a lower bound says nothing about the likelihood. With b >= 1,
    term_i = (1/b) log mean_k [ (hidden_i / t) p(x_i | copy k)^b ],
    an upper bound of log p up to a constant that does not depend on the model. The
    logarithm of a mean of few copies is biased: below it on average.

    Args:
        power: b, >= 1.
        times, masks, spread: as for `ELBO`.
    Raises:
        ValueError: for a power below 1.
    Source: SPG (arXiv 2510.09541), eq. 7. Introduced in notebook 18.
    """

    def __init__(self, power: float = 1.5, times: int = 8, masks: int = 1, **options):
        check(power >= 1, "power", power, ">= 1")
        super().__init__(times, masks, **options)
        self.power = power

    def combine(self, logprob, weight):
        never = (weight == 0).all(1)  # hidden in no copy: nothing is known of it
        terms = weight.log() + self.power * logprob
        terms = terms.masked_fill(never[:, None], 0.0).logsumexp(1) / self.power
        return terms.masked_fill(never, 0.0)


class InOrder(Estimator):
    """One token at a time in a given order: the exact log-probability of that order.

    sum_i log p(x_{o(i)} | x_{o(1)}, …, x_{o(i-1)}), L forwards.

    Args:
        order: "left_to_right", or "random" for a new order in every row, whose mean is
            the evidence lower bound.
    Raises:
        ValueError: for another order.
    Source: JustGRPO (arXiv 2601.15165) for left to right. Introduced in notebook 18.
    """

    def __init__(self, order: str = "left_to_right"):
        known = ("left_to_right", "random")
        check(order in known, "order", order, f"one of {known}")
        self.order = order

    def plan(self, completion_ids, generator, commit_step):
        rank = torch.arange(completion_ids.shape[1], device=completion_ids.device)
        rank = rank.expand(completion_ids.shape)
        if self.order == "random":
            draw = uniform(completion_ids.shape, generator, completion_ids.device)
            rank = draw.argsort(1).argsort(1)
        return *by_step(rank, rank.shape[1]), 1


class Trajectory(Estimator):
    """Along the steps the decoder took: tokens of a step are scored where it stood.

    sum_s sum_{i written at s} log p(x_i | canvas before step s). Exact for the tokens;
    the choice of positions is scored by the order policy, if that is learned. With
    `segments`, N canvases stand for all S steps.

    Args:
        segments: N; None takes every step.
    Raises:
        ValueError: for fewer than one segment, or without `commit_step`.
    Source: DCoLT (arXiv 2505.10446); d2's StepMerge (arXiv 2509.21474). Introduced in
    notebook 18.
    """

    def __init__(self, segments: int | None = None):
        fits = segments is None or segments >= 1
        check(fits, "segments", segments, "None or an integer >= 1")
        self.segments = segments

    def plan(self, completion_ids, generator, commit_step):
        step, steps = dense_steps(known(commit_step))
        if self.segments is None:
            return *by_step(step, int(steps.max())), 1
        segment = step * self.segments // steps[:, None]
        return *by_step(segment, self.segments), 1


class OneState(Estimator):
    """One step of the trajectory, drawn at random, for each block (dTRPO).

    With S_b steps in block b and s ~ U{1 … S_b}:
    sum_b S_b sum_{i written at s} log p(x_i | canvas before s), whose mean is the
    log-probability of the whole trajectory. The canvas is the finished answer with what
    came later hidden again, so no rollout has to be stored.

    Args:
        block_length: of the decoder; None for one block.
        together: all blocks in one copy, each in its own state: one forward instead of
            one a block. With full attention a block then sees the later tokens of the
            blocks before it hidden, so this is an approximation.
    Raises:
        ValueError: for a block below 1, or without `commit_step`.
    Source: dTRPO (arXiv 2603.18806); the derivation is ours, see the page. Introduced
    in notebook 18.
    """

    def __init__(self, block_length: int | None = None, together: bool = False):
        fits = block_length is None or block_length >= 1
        check(fits, "block_length", block_length, "None or an integer >= 1")
        self.block_length, self.together = block_length, together

    def plan(self, completion_ids, generator, commit_step):
        length, device = completion_ids.shape[1], completion_ids.device
        commit_step = known(commit_step)
        size = self.block_length or length
        block = torch.arange(length, device=device) // size
        hidden, weight = [], []
        for number in range(int(block[-1]) + 1):
            inside = block == number
            step, steps = dense_steps(commit_step[:, inside])
            draw = uniform(steps.shape, generator, device)
            drawn = (draw * steps).long()[:, None]
            later = torch.zeros_like(completion_ids, dtype=torch.bool)
            later[:, inside] = step >= drawn
            later[:, block > number] = not self.together
            now = torch.zeros_like(later)
            now[:, inside] = step == drawn
            hidden.append(later)
            weight.append(now * steps[:, None].to(torch.get_default_dtype()))
        hidden, weight = torch.stack(hidden, 1), torch.stack(weight, 1)
        if self.together:
            hidden, weight = hidden.any(1, True), weight.sum(1, True)
        return hidden, weight, 1


def by_step(step: Int[Tensor, "B L"], steps: int):
    """(hidden, weight) of the copies before each step: what it and later ones wrote."""
    number = torch.arange(steps, device=step.device)[None, :, None]
    return step[:, None] >= number, ones(step[:, None] == number)


def known(commit_step) -> Int[Tensor, "B L"]:
    """The steps of a rollout; ValueError if a row was not written."""
    check(commit_step is not None, "commit_step", None, "the steps of the rollout")
    written = (commit_step >= 0).any(1)
    check(bool(written.all()), "commit_step", commit_step, "steps >= 0 in every row")
    return commit_step


def dense_steps(commit_step) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"]]:
    """Steps that wrote something, counted from 0 in each row, and their number.

    Tokens that were given keep the step -1: they are never hidden and never scored.
    """
    given = commit_step < 0
    other = commit_step[:, None, :] - commit_step[:, :, None]  # [B, i, j]
    first = ~(other == 0).tril(-1).any(2) & ~given  # one token stands for its step
    dense = ((other < 0) & first[:, None, :]).sum(2).masked_fill(given, -1)
    return dense, dense.max(1).values + 1
