"""ARness: how close a decode came to writing from left to right."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.trace import Trace
from dlmlib.errors import check
from dlmlib.measure.chance import global_chance, local_chance
from dlmlib.measure.interval import mean_interval

TIES = ("left_to_right", "confidence", "set")


@dataclass
class ARness:
    """One number a row, and what a random order would get with the same step sizes.

    Fields:
        rows: the measure of each row, in [0, 1]; nan where a row has nothing to count.
        chance: its exact expectation over uniformly random orders.
    Introduced in notebook 11.
    """

    rows: Float[Tensor, " B"]
    chance: Float[Tensor, " B"]

    @property
    def mean(self) -> float:
        """Mean over the rows."""
        return self.rows.nanmean().item()

    @property
    def above_chance(self) -> Float[Tensor, " B"]:
        """(rows - chance) / (1 - chance): 0 for a random order, 1 for left to right.

        The form to compare across step counts: more tokens a step raise the chance
        level. nan for a row that was written in one step: every order is that order.
        """
        return (self.rows - self.chance) / (1 - self.chance)

    def interval(self, level: float = 0.95, generator=None) -> tuple[float, float]:
        """Confidence interval of the mean; bootstrap with a generator, else normal."""
        return mean_interval(self.rows, level, generator)

    def __float__(self) -> float:
        return self.mean

    def __format__(self, how: str) -> str:
        return format(self.mean, how)


def arness(
    trace: Trace | Int[Tensor, "B T"],
    k: int = 1,
    *,
    tie: str = "left_to_right",
    columns: slice | Bool[Tensor, "*B T"] | None = None,
) -> ARness:
    """Global ARness@k: share of tokens written into one of the k leftmost masks.

    (1/n) sum_c 1[p_c in the k smallest of M_{c-1}], p_c the position of the c-th commit
    and M_{c-1} the positions masked before it. Left to right gives 1 for every k.

    Positions are counted among the written ones: given tokens and padding are skipped,
    wherever they stand. A token that was taken back counts where it was written last.

    Args:
        trace: of a decode; or the step that wrote each position, -1 for given ones.
        k: how many of the leftmost masks count.
        tie: what c means when a step writes several tokens, which the definitions leave
            open. "left_to_right" and "confidence" sort the tokens of a step that way.
            "set" keeps them together: a step of s tokens should write the leftmost
            s + k - 1 masks.
        columns: positions to measure, as if there were no others; for example without
            the filler after the end. Default all that was written.
    Returns:
        `ARness` of every row.
    Raises:
        ValueError: k < 1, an unknown tie, or "confidence" without a trace.
    Source: NAP (arXiv 2602.23225), eq. 2-3; DiffuCoder (arXiv 2506.20639), appendix
    A.2. Introduced in notebook 11.
    """
    check(tie in TIES, "tie", tie, f"one of {TIES}")
    rows, chance = [], []
    for step, time in written_order(trace, k, tie, columns):
        when = step if tie == "set" else time
        later = when[None] >= when[:, None]  # [n, n]: q not before p
        left = later.tril(-1).sum(1)  # masks left of p when p was written
        size = step.bincount()[step]
        allowed = size + k - 1 if tie == "set" else k
        rows.append((left < allowed).double().mean())
        chance.append(global_chance(step.bincount().tolist(), k, tie))
    return ARness(torch.stack(rows), torch.tensor(chance, dtype=torch.float64))


def local_arness(
    trace: Trace | Int[Tensor, "B T"],
    k: int = 1,
    *,
    match: str = "run",
    start: str = "prompt",
    tie: str = "left_to_right",
    columns: slice | Bool[Tensor, "*B T"] | None = None,
) -> ARness:
    """Local ARness@k: share of tokens that continue the last k commits to the right.

    (1/n) sum_c 1[(p_{c-k}, …, p_{c-1}) = (p_c - k, …, p_c - 1)]. k = 1 is "the next
    token". It never rises with k.

    Args:
        trace, columns: as for `arness`.
        k: how many commits before this one must be its left neighbours.
        match: "run", in rising order as the caption in DiffuCoder has it, or "set", in
            any order as its formula has it. They agree for k = 1.
        start: "prompt", the prompt counts as written from left to right before the
            first commit, so that left to right gives 1; or "skip", the first k commits
            are left out and the sum is divided by n - k.
        tie: "left_to_right" or "confidence", as for `arness`.
    Returns:
        `ARness` of every row.
    Raises:
        ValueError: k < 1, or an unknown match, start or tie.
    Source: DiffuCoder (arXiv 2506.20639), appendix A.2. Introduced in notebook 11.
    """
    check(match in ("run", "set"), "match", match, "'run' or 'set'")
    check(start in ("prompt", "skip"), "start", start, "'prompt' or 'skip'")
    check(tie in TIES[:2], "tie", tie, f"one of {TIES[:2]}")
    rows, chance = [], []
    for step, time in written_order(trace, k, tie, columns):
        before = torch.arange(-k, 0)  # the prompt's commits
        padded = torch.cat([before, time])  # time of position p at p + k
        lag = time[:, None] - padded.unfold(0, k, 1)[: len(time)].flip(1)  # [n, k]
        wanted = torch.arange(1, k + 1)
        hit = (lag.sort(1).values if match == "set" else lag) == wanted
        hit = hit.all(1)
        if start == "skip":
            hit = hit[time >= k]
        rows.append(hit.double().mean())
        sizes = [1] * len(step) if tie == "confidence" else step.bincount().tolist()
        chance.append(local_chance(sizes, k, match, start))
    return ARness(torch.stack(rows), torch.tensor(chance, dtype=torch.float64))


def written_order(trace, k, tie, columns) -> list[tuple[Tensor, Tensor]]:
    """Per row, over its n measured positions: number of the step, and of the commit.

    Steps that wrote none of them are not counted. Both run from 0.
    """
    check(isinstance(k, int) and k >= 1, "k", k, "an integer >= 1")
    if isinstance(trace, Trace):
        step, confidence = trace.commit_step.cpu(), trace.commit_logprob.cpu()
    else:
        check(tie != "confidence", "tie", tie, "another one without a trace")
        check(trace.dim() == 2, "trace.dim()", trace.dim(), "2: rows and positions")
        step, confidence = trace.cpu(), None
    counted = step >= 0
    if isinstance(columns, slice):
        chosen = torch.zeros_like(counted)
        chosen[:, columns] = True
        counted = counted & chosen
    elif columns is not None:
        counted = counted & columns.cpu()
    orders = []
    for row, keep in enumerate(counted):
        number = step[row, keep].unique(return_inverse=True)[1]
        first = torch.arange(len(number))
        if tie == "confidence":
            first = confidence[row, keep].argsort(descending=True, stable=True)
        commits = first[number[first].argsort(stable=True)]
        orders.append((number, commits.argsort()))
    return orders
