"""Where may this step write? The first question of every decoder."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.canvas import Canvas
from dlmlib.decoding.commit import ranks
from dlmlib.errors import check


class Everywhere:
    """Any undecided position may be written at any step (pure diffusion).

    Also the base of the others: one phase, and the ranks of the order as they are.

    Source: MDLM (arXiv 2406.07524), LLaDA (arXiv 2502.09992). Introduced in
    notebook 03.
    """

    def phases(self, canvas: Canvas) -> int:
        """Number of phases that share the step budget: one."""
        return 1

    def steps_in_phase(self, steps: int, canvas: Canvas) -> Int[Tensor, " B"]:
        """Steps of `steps` that each row's phase may take; the remainder first."""
        phases = self.phases(canvas)
        return steps // phases + (canvas.phase < steps % phases).long()

    def rank(
        self, score: Float[Tensor, "B T"], open_: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """The scores that `commit` ranks by: those of the order policy."""
        return score

    def region(self, canvas: Canvas) -> Bool[Tensor, "B T"]:
        """Positions of each row's current phase: all."""
        return torch.ones_like(canvas.fixed)

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "B T"]:
        """Undecided positions that may be written now."""
        return canvas.masked


class Blocks(Everywhere):
    """Blocks of `length` from left to right; the next opens when one is full.

    Semi-autoregressive decoding: free order inside a block, fixed order between blocks.
    Masks left of the first block belong to it. Rows move on independently.

    Args:
        length: tokens per block; the last block may be shorter.
        start: column where the first block begins; None for the end of the prompt. With
            it, a canvas that already holds some tokens is filled block by block.
    Raises:
        ValueError: if length < 1 or start < 0.
    Source: LLaDA (arXiv 2502.09992), section 2.4 and its generate. Introduced in
    notebook 03.
    """

    def __init__(self, length: int, start: int | None = None):
        check(
            isinstance(length, int) and length >= 1,
            "block_length",
            length,
            "an integer >= 1",
        )
        check(start is None or start >= 0, "start", start, "None or an integer >= 0")
        self.length, self.start = length, start

    def block_of(self, canvas: Canvas) -> Int[Tensor, " T"]:
        """Block number of every column."""
        columns = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
        return (columns - self.origin(canvas)).clamp_min(0) // self.length

    def phases(self, canvas: Canvas) -> int:
        """Number of blocks, from the shapes alone: no device has to be waited for."""
        open_ended = canvas.ids.shape[1] - self.origin(canvas)
        return max(1, -(-open_ended // self.length))

    def origin(self, canvas: Canvas) -> int:
        """Column where the first block begins."""
        return canvas.prompt_length if self.start is None else self.start

    def region(self, canvas: Canvas) -> Bool[Tensor, "B T"]:
        """Positions of each row's current block."""
        return self.block_of(canvas) == canvas.phase[:, None]

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "B T"]:
        """Undecided positions of each row's first unfinished block."""
        masked, block = canvas.masked, self.block_of(canvas)
        last = block[-1]
        first = torch.where(masked, block, last).min(1).values
        canvas.enter(first)
        return masked & self.region(canvas)


class Streams(Everywhere):
    """Several ranges of columns written side by side, then a summary (parallel-forced).

    A step's budget is dealt to the streams in turn: the surest position of each, then
    the second surest of each, and so on. So k tokens over m unfinished streams are
    k / m each, the remainder goes to the surest, and what a full stream leaves goes to
    the others. Inside a stream the order policy alone decides. The summary opens when
    all streams of its row are full; steps are shared between the two phases, at least
    one each.

    Headers are given tokens around the ranges: put them into the prompt, with [MASK]
    between them.

    Args:
        streams: columns of each stream as slices of the canvas; slice(-5, None) are its
            last five. Lengths may differ.
        summary: columns written after the streams; None for no such phase.
        concurrent: the summary is one more stream and waits for nobody.
        summary_steps: steps of the summary; None for a share of all steps in proportion
            to its tokens. A summary that is a chain needs as many as it is deep.
    Raises:
        ValueError: no stream, summary_steps < 1, or, when used: an empty range, ranges
            that overlap, or a [MASK] outside of them.
    Source: NAP (arXiv 2602.23225), section 5.3, which leaves open when the summary
    begins and who inherits the budget of a full stream. Introduced in notebook 13.
    """

    def __init__(
        self,
        streams: Sequence[slice],
        summary: slice | None = None,
        concurrent: bool = False,
        summary_steps: int | None = None,
    ):
        whole = summary_steps is None or summary_steps >= 1
        check(whole, "summary_steps", summary_steps, "None or an integer >= 1")
        self.summary_steps = summary_steps
        self.streams, self.summary = tuple(streams), summary
        check(len(self.streams) > 0, "streams", streams, "at least one slice")
        if concurrent and summary is not None:
            self.streams, self.summary = (*self.streams, summary), None

    def stream_of(self, canvas: Canvas) -> Int[Tensor, " T"]:
        """Number of every column's stream; the summary has the last, -1 is outside."""
        number = torch.full_like(canvas.ids[0], -1)
        ranges = (*self.streams, *([self.summary] if self.summary else []))
        for index, columns in enumerate(ranges):
            chosen = number[columns]
            free = len(chosen) > 0 and bool((chosen < 0).all())
            check(free, "streams", columns, f"columns of {len(number)}, each once")
            number[columns] = index
        outside = (number < 0) & canvas.masked
        check(not bool(outside.any()), "streams", ranges, "a range for every [MASK]")
        return number

    def phases(self, canvas: Canvas) -> int:
        """The streams, and the summary if there is one."""
        return 1 if self.summary is None else 2

    def steps_in_phase(self, steps: int, canvas: Canvas) -> Int[Tensor, " B"]:
        """Steps of the current phase, at least one each."""
        if self.summary is None:
            return super().steps_in_phase(steps, canvas)
        to_write = ~canvas.fixed
        last = to_write & (self.stream_of(canvas) == len(self.streams))
        share = last.sum(1) / to_write.sum(1).clamp_min(1)
        after = (steps * share).round().long()
        if self.summary_steps is not None:
            after = torch.full_like(after, self.summary_steps)
        after = after.clamp((share > 0).long(), steps - (share < 1).long())
        return torch.where(canvas.phase == 1, after, steps - after)

    def region(self, canvas: Canvas) -> Bool[Tensor, "B T"]:
        """Positions of each row's current phase."""
        in_summary = self.stream_of(canvas) == len(self.streams)
        return in_summary == (canvas.phase == 1)[:, None]

    def rank(self, score, open_):
        """Round robin: first of every stream, then every second, …; ties by score."""
        turn = torch.zeros_like(score)
        for columns in self.streams:
            turn[:, columns] = ranks(score[:, columns]).to(score.dtype)
        dealt = -(turn * score.shape[1] + ranks(score))
        return dealt.masked_fill(~open_, -torch.inf)

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "B T"]:
        """Undecided positions of the streams; of the summary when these are full."""
        masked = canvas.masked
        if self.summary is not None:
            in_streams = self.stream_of(canvas) < len(self.streams)
            canvas.enter((~(masked & in_streams).any(1)).long())
        return masked & self.region(canvas)
