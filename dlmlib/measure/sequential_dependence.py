"""How much a text's segments depend on each other, by two estimators."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dlmlib.errors import check
from dlmlib.measure.interval import mean_interval
from dlmlib.model.call import logits_at, mask_token_of, unwrapped

CHUNK = 256  # rows of a large vocabulary in float64 at once
Boundaries = Sequence[int] | Callable[[list[int]], Sequence[int]]


@dataclass
class Dependence:
    """log p(s_n | x, s_<n) - log p(s_n | x) of every row and segment n = 2 … N.

    Fields:
        nats: the differences; nan where a row has fewer segments.
        tokens: length of these segments; 0 where there is none.
    Introduced in notebook 12.
    """

    nats: Float[Tensor, "B M"]
    tokens: Int[Tensor, "B M"]

    @property
    def rows(self) -> Float[Tensor, " B"]:
        """SeqDep of each row: mean over its segments, in nats per segment."""
        return self.nats.nanmean(1)

    @property
    def mean(self) -> float:
        """SeqDep of the data: mean over rows, in nats per segment."""
        return self.rows.nanmean().item()

    @property
    def per_token(self) -> float:
        """All nats over all tokens: what is left when segments differ in length."""
        return (self.nats.nansum() / self.tokens.sum()).item()

    @property
    def by_segment(self) -> Float[Tensor, " M"]:
        """Mean over rows for n = 2 … N, in nats per segment."""
        return self.nats.nanmean(0)

    @property
    def by_segment_per_token(self) -> Float[Tensor, " M"]:
        """As `by_segment`, in nats per token."""
        return self.nats.nansum(0) / self.tokens.sum(0)

    def interval(self, level: float = 0.95, generator=None) -> tuple[float, float]:
        """Confidence interval of the mean; bootstrap with a generator, else normal."""
        return mean_interval(self.rows, level, generator)


@dataclass
class Job:
    """A sequence whose tokens at some places count for the segments of one row.

    Fields:
        tokens: what the model sees.
        places: columns that are scored.
        targets: the token at each place.
        segment: which segment each place counts for, 0 for s_2.
        sign: 1 for log p(s_n | x, s_<n), -1 for log p(s_n | x).
        total: [N - 1], the differences of the row, to which the scores are added.
    """

    tokens: list[int]
    places: range
    targets: list[int]
    segment: list[int]
    sign: int
    total: Tensor


def sequential_dependence(
    scorer,
    data: Int[Tensor, "B T"] | Iterable,
    segments: Boundaries,
    *,
    batch_size: int = 16,
    next_token: bool | None = None,
) -> Dependence:
    """SeqDep by an autoregressive scorer.

    SeqDep(x, s) = 1/(N - 1) sum_{n >= 2} [log p(s_n | x, s_<n) - log p(s_n | x)]

    log p(s_n | x) is read with s_n placed right after x. So it is the chance that x is
    continued by s_n, not that s_n stands where it stood: a scorer that counts places
    sees more than the dependence between segments. `masked_dependence` does not.

    Args:
        scorer: any causal model that maps input_ids to `.logits`.
        data: rows of token ids, or what a `datasets` stream gives: dicts with
            "input_ids". Rows may differ in length.
        segments: columns where s_1, …, s_N begin and the end of s_N, or a function from
            a row's ids to them. x is what stands before s_1; what stands after s_N is
            ignored. A row with fewer than two segments gives nan.
        batch_size: sequences in a forward.
        next_token: whether logits[:, i] are about token i + 1, as in transformers, or
            about token i, as here. None: as here for a model with our config.
    Returns:
        `Dependence` of every row.
    Raises:
        ValueError: boundaries that do not rise within the row, or an empty x.
    Source: NAP (arXiv 2602.23225), eq. 4. Introduced in notebook 12.
    """
    if next_token is None:
        config = getattr(unwrapped(scorer), "config", None)
        next_token = not hasattr(config, "shift_logits")

    def score(jobs: list[Job]) -> None:
        jobs = sorted(jobs, key=length_of)  # little padding, on the right: not seen
        for some in batches(jobs, batch_size):
            add_scores(scorer, some, shift=1 if next_token else 0)

    return measured(data, segments, causal_jobs, score, 4 * batch_size)


def causal_jobs(ids: list[int], cuts: list[int], total: Tensor) -> list[Job]:
    """One forward of the whole row scores each segment in context; one each, alone."""
    check(cuts[0] >= 1, "segments", cuts, "at least one token before s_1")
    spans, prefix = list(pairwise(cuts))[1:], ids[: cuts[0]]
    segment = [n for n, (start, stop) in enumerate(spans) for _ in range(start, stop)]
    scored = range(cuts[1], cuts[-1])
    jobs = [Job(ids[: cuts[-1]], scored, ids[cuts[1] : cuts[-1]], segment, 1, total)]
    for n, (start, stop) in enumerate(spans):
        own, size = ids[start:stop], stop - start
        places = range(cuts[0], cuts[0] + size)
        jobs.append(Job(prefix + own, places, own, [n] * size, -1, total))
    return jobs


def masked_dependence(
    model,
    data: Int[Tensor, "B T"] | Iterable,
    segments: Boundaries,
    *,
    batch_size: int = 256,
    mask_token_id: int | None = None,
) -> Dependence:
    """SeqDep by a masked diffusion model: earlier segments visible, or masked in place.

    Both terms are chain rules from left to right inside s_n, on canvases of one length
    in which all later tokens are [MASK]; only s_<n differs. So log p(s_n | x) is about
    s_n in its own place. It takes two forwards of a row for each token.

    Args and Returns: as `sequential_dependence`.
    Raises:
        ValueError: boundaries that do not rise within the row, or no known [MASK].
    Introduced in notebook 12.
    """
    mask = mask_token_of(model, mask_token_id)

    def jobs_of(ids: list[int], cuts: list[int], total: Tensor) -> list[Job]:
        jobs, prefix = [], ids[: cuts[0]]
        for n, (start, stop) in enumerate(list(pairwise(cuts))[1:]):
            earlier = {1: ids[cuts[0] : start], -1: [mask] * (start - cuts[0])}
            for sign, before in earlier.items():
                for i in range(start, stop):
                    canvas = prefix + before + ids[start:i] + [mask] * (cuts[-1] - i)
                    jobs.append(
                        Job(canvas, range(i, i + 1), [ids[i]], [n], sign, total)
                    )
        return jobs

    def score(jobs: list[Job]) -> None:
        # No padding: the context must be of one size.
        for _, same in groupby(sorted(jobs, key=length_of), key=length_of):
            for some in batches(list(same), batch_size):
                add_scores(model, some)

    return measured(data, segments, jobs_of, score, 4 * batch_size)


def measured(data, segments, jobs_of, score, chunk: int) -> Dependence:
    """Cut the rows, and score their jobs as soon as there are `chunk` of them.

    Args:
        data, segments: as for `sequential_dependence`.
        jobs_of: (ids, cuts, total) -> the jobs of a row with two segments or more.
        score: adds the log-probabilities of jobs to the totals of their rows.
    """
    check(chunk >= 1, "batch_size", chunk, "an integer >= 1")
    totals, lengths, pending = [], [], []
    for row in data:
        ids = row["input_ids"] if isinstance(row, dict) else row
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        cuts = cut(ids, segments)
        sizes = [stop - start for start, stop in pairwise(cuts)][1:]
        lengths.append(torch.tensor(sizes, dtype=torch.long))
        totals.append(torch.zeros(len(sizes), dtype=torch.float64))
        pending += jobs_of(ids, cuts, totals[-1]) if sizes else []
        if len(pending) >= chunk:
            score(pending)
            pending = []
    score(pending)
    check(len(totals) > 0, "data", data, "at least one row")
    nats = pad_sequence(totals, batch_first=True, padding_value=torch.nan)
    return Dependence(nats, pad_sequence(lengths, batch_first=True))


def cut(ids: list[int], segments: Boundaries) -> list[int]:
    """The boundaries of a row, checked."""
    cuts = list(segments(ids) if callable(segments) else segments)
    rising = all(start < stop for start, stop in pairwise(cuts))
    fits = len(cuts) > 0 and rising and cuts[0] >= 0 and cuts[-1] <= len(ids)
    check(fits, "segments", cuts, f"rising columns within 0 … {len(ids)}")
    return cuts


def length_of(job: Job) -> int:
    """Number of tokens that the model sees."""
    return len(job.tokens)


def batches(jobs: list[Job], size: int) -> list[list[Job]]:
    """Jobs in their order, `size` at a time."""
    return [jobs[first : first + size] for first in range(0, len(jobs), size)]


@torch.no_grad()
def add_scores(model, jobs: list[Job], shift: int = 0) -> None:
    """Score jobs in one forward, in float64, and add each to its row's differences."""
    device = getattr(model, "device", None)
    ids = [torch.tensor(job.tokens, device=device) for job in jobs]
    ids = pad_sequence(ids, batch_first=True)
    at = torch.zeros_like(ids, dtype=torch.bool)
    for line, job in enumerate(jobs):
        at[line, job.places.start - shift : job.places.stop - shift] = True
    logits = logits_at(model, ids, at)  # [N, V]
    target = torch.tensor([t for job in jobs for t in job.targets], device=device)
    norm = torch.cat([part.double().logsumexp(-1) for part in logits.split(CHUNK)])
    scores = (logits.gather(1, target[:, None])[:, 0].double() - norm).cpu()
    sizes = [len(job.targets) for job in jobs]
    for job, nats in zip(jobs, scores.split(sizes), strict=True):
        job.total.index_add_(0, torch.tensor(job.segment), job.sign * nats)


def equal_segments(length: int, start: int = 1) -> Callable[[list[int]], list[int]]:
    """Segments of `length` tokens after the first `start`; what is left over is cut.

    Raises:
        ValueError: length < 1 or start < 0.
    Introduced in notebook 12.
    """
    check(length >= 1, "length", length, "an integer >= 1")
    check(start >= 0, "start", start, "an integer >= 0")
    return lambda ids: list(range(min(start, len(ids)), len(ids) + 1, length))


def segments_after(token_id: int, start: int = 1) -> Callable[[list[int]], list[int]]:
    """A new segment after every `token_id`, such as a full stop, from `start` on.

    Raises:
        ValueError: start < 0.
    Introduced in notebook 12.
    """
    check(start >= 0, "start", start, "an integer >= 0")

    def cuts(ids: list[int]) -> list[int]:
        ends = {i + 1 for i in range(start, len(ids)) if ids[i] == token_id}
        return sorted({min(start, len(ids)), len(ids)} | ends)

    return cuts
