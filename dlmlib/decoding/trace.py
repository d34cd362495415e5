"""What a decode did, step by step; measures, pictures and RL read it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.errors import check


@dataclass
class Trace:
    """Everything that happened while one batch was decoded.

    Fields, with S steps, B rows and T columns:
        start: the canvas before the first step.
        proposed: token proposed at each open position, -1 elsewhere.
        logprob: its log-probability under the clean logits, nan where not open.
        score: what the order policy ranked by, nan where not open.
        written: committed at this step.
        erased: taken back at this step.
        valid: False on padding.
        mask_token_id: the [MASK] token.
    Introduced in notebook 03.
    """

    start: Int[Tensor, "B T"]
    proposed: Int[Tensor, "S B T"]
    logprob: Float[Tensor, "S B T"]
    score: Float[Tensor, "S B T"]
    written: Bool[Tensor, "S B T"]
    erased: Bool[Tensor, "S B T"]
    valid: Bool[Tensor, "B T"]
    mask_token_id: int

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return len(self.proposed)

    @property
    def confidence(self) -> Float[Tensor, "S B T"]:
        """Probability of the proposed token, nan where not open."""
        return self.logprob.exp()

    def canvas(self, step: int) -> Int[Tensor, "B T"]:
        """The tokens after `step` steps; 0 is the start, S the end.

        Raises:
            ValueError: if step is outside 0 … S.
        """
        check(0 <= step <= self.steps, "step", step, f"within 0 … {self.steps}")
        ids = self.start.clone()
        for s in range(step):
            ids = torch.where(self.written[s], self.proposed[s], ids)
            ids = ids.masked_fill(self.erased[s], self.mask_token_id)
        return ids

    @property
    def commit_step(self) -> Int[Tensor, "B T"]:
        """Step (from 0) that wrote the final token of each position, -1 if none did."""
        numbered = torch.arange(self.steps, device=self.start.device)[:, None, None]
        last = torch.where(self.written, numbered, -1)
        return last.max(0).values if self.steps else torch.full_like(self.start, -1)

    @property
    def commit_logprob(self) -> Float[Tensor, "B T"]:
        """Log-probability of the final token when it was written, nan if never."""
        step = self.commit_step
        if not self.steps:
            return torch.full(step.shape, torch.nan)
        chosen = self.logprob.gather(0, step.clamp_min(0)[None])[0]
        return chosen.masked_fill(step < 0, torch.nan)

    def order(self, row: int = 0) -> list[int]:
        """Columns of one row in the order of their final commits.

        Columns written in the same step come left to right.

        Raises:
            ValueError: if the row does not exist.
        """
        rows = len(self.start)
        check(0 <= row < rows, "row", row, f"within 0 … {rows - 1}")
        step = self.commit_step[row]
        written = (step >= 0).nonzero()[:, 0]
        return written[step[written].argsort(stable=True)].tolist()


class Recorder:
    """Collects the steps of a running decode into a `Trace`."""

    def __init__(self, canvas):
        self.start = canvas.ids.clone()
        self.valid, self.mask_token_id = canvas.valid, canvas.mask_token_id
        self.steps: list[tuple[Tensor, ...]] = []

    def add(self, rows, open_, proposal, keep, back) -> None:
        """Record one step of the active rows; the other rows did nothing."""
        blank = self.start

        def spread(part, fill, dtype):
            full = torch.full(blank.shape, fill, dtype=dtype, device=blank.device)
            full[rows] = part.to(dtype)
            return full

        shown = proposal.token.masked_fill(~open_, -1)
        numbers = proposal.logprob.masked_fill(~open_, torch.nan)
        ranks = proposal.score.masked_fill(~open_, torch.nan)
        self.steps.append(
            (
                spread(shown, -1, torch.long),
                spread(numbers, torch.nan, torch.float32),
                spread(ranks, torch.nan, torch.float32),
                spread(keep, False, torch.bool),
                spread(back, False, torch.bool),
            )
        )

    def finish(self) -> Trace:
        """The trace of all steps so far."""
        shape = (0, *self.start.shape)
        kinds = (torch.long, torch.float32, torch.float32, torch.bool, torch.bool)
        empty = [
            torch.empty(shape, dtype=kind, device=self.start.device) for kind in kinds
        ]
        parts = [torch.stack(part) for part in zip(*self.steps, strict=True)] or empty
        return Trace(self.start, *parts, self.valid, self.mask_token_id)
