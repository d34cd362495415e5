"""Where may this step write? The first question of every decoder."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.decoding.canvas import Canvas
from dlmlib.errors import check


class Everywhere:
    """Any undecided position may be written at any step (pure diffusion).

    Source: MDLM (arXiv 2406.07524), LLaDA (arXiv 2502.09992). Introduced in
    notebook 03.
    """

    def phases(self, canvas: Canvas) -> int:
        """Number of phases that share the step budget: one."""
        return 1

    def region(self, canvas: Canvas) -> Bool[Tensor, "B T"]:
        """Positions of each row's current phase: all."""
        return torch.ones_like(canvas.fixed)

    def __call__(self, canvas: Canvas) -> Bool[Tensor, "B T"]:
        """Undecided positions that may be written now."""
        return canvas.masked


class Blocks:
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
