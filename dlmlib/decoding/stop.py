"""May we stop? The answer is often known before the last step."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.canvas import Canvas
from dlmlib.errors import check
from dlmlib.model.lazy_logits import LazyLogits, by_chunks


class EarlyCommit:
    """Write everything at once as soon as the answer is settled (Prophet).

    The gap is the lead of the best over the second-best *logit*, averaged over the
    answer's positions, whether or not they are written already. With progress
    p = step / steps the row is finished if

        gap >= gaps[0] for p < 0.33,  gaps[1] for p < 0.67,  gaps[2] after that.

    Args:
        answer: columns of the answer; slice(-5, None) are the last five.
        gaps: the three thresholds, in logits.
        steps: S, needed with an adaptive commit, which has no step budget of its own.
    Raises:
        ValueError: unless there are three gaps >= 0.
    Source: Prophet (arXiv 2508.19982), section 4. Introduced in notebook 10.
    """

    def __init__(
        self,
        answer: slice = slice(-5, None),
        gaps: tuple[float, float, float] = (7.5, 5.0, 2.5),
        steps: int | None = None,
    ):
        fits = len(gaps) == 3 and all(gap >= 0 for gap in gaps)
        check(fits, "gaps", gaps, "three numbers >= 0")
        check(steps is None or steps >= 1, "steps", steps, "None or an integer >= 1")
        self.answer, self.gaps, self.steps = answer, gaps, steps

    def columns(self, canvas: Canvas) -> Bool[Tensor, " T"]:
        """True on the answer's columns.

        Raises:
            ValueError: if the slice selects nothing.
        """
        chosen = torch.zeros_like(canvas.fixed[0])
        chosen[self.answer] = True
        check(bool(chosen.any()), "answer", self.answer, f"columns of {len(chosen)}")
        return chosen

    def watches(self, canvas: Canvas) -> Bool[Tensor, "B T"]:
        """Positions whose logits it needs: the answer, and all it may have to write."""
        return canvas.masked | self.columns(canvas)

    def __call__(
        self,
        canvas: Canvas,
        rows: Int[Tensor, " b"],
        watched: Bool[Tensor, "b T"],
        logits: Float[Tensor, "N V"] | LazyLogits,
        steps: int,
    ) -> Bool[Tensor, " b"]:
        """Rows whose answer is settled.

        Args:
            canvas: the rows now.
            rows: those that take part in this step.
            watched: where `logits` were computed.
            logits: clean, in row-major order of `watched`.
            steps: S, the budget of the whole decode.
        """
        here = self.columns(canvas).expand_as(watched)
        tops = by_chunks(lambda part: part.topk(2).values, logits[here[watched]])
        best = torch.cat(tops)
        gap = (best[:, 0] - best[:, 1]).view(len(rows), -1).mean(1)
        progress = canvas.steps_taken[rows] / steps
        early, middle, late = (gap.new_tensor(value) for value in self.gaps)
        needed = torch.where(progress < 0.67, middle, late)
        return gap >= torch.where(progress < 0.33, early, needed)
