"""Do we take anything back? Committed tokens may become masks again."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.canvas import Canvas
from dlmlib.device import uniform
from dlmlib.errors import check

RULES = ("cap", "rescale", "conf", "loop")


class Remask:
    """ReMDM: each written token is masked again with chance sigma.

    At step j of S, alpha_t = j / S and alpha_s = (j + 1) / S are the shares written
    before and after, and sigma may be at most sigma_max = min(1, (1 - alpha_s) /
    alpha_t). The rules choose below that:
    - "cap": min(eta, sigma_max).
    - "rescale": eta sigma_max.
    - "conf": sigma_max softmax(-confidence) over the written tokens of the row: the
      chances sum to sigma_max, most of it on the least sure.
    - "loop": no change of schedule until the share `alpha_on` is written; then
      `rounds` extra steps that take back with min(eta, sigma_max) and write as many.

    As many tokens are written in addition as are taken back, so the number of masks
    follows the schedule and none is left at the end.

    Args:
        rule: one of the four.
        eta: strength in [0, 1]; unused by "conf".
        steps: S of each block, needed with an adaptive commit, which has no budget of
            its own (a schedule's own is used instead); nothing is taken back after it.
        alpha_on: "loop" only: share written when the loop begins, in (0, 1).
        rounds: "loop" only: number of extra steps in each block.
    Raises:
        ValueError: for an unknown rule or a number outside its range.
    Source: ReMDM (arXiv 2503.00307), section 4. Its loop spends half of the steps
    looping; here the loop comes on top of the schedule. Introduced in notebook 03.
    """

    def __init__(
        self,
        rule: str = "cap",
        eta: float = 0.02,
        steps: int | None = None,
        alpha_on: float = 0.9,
        rounds: int = 0,
    ):
        check(rule in RULES, "rule", rule, f"one of {RULES}")
        check(0 <= eta <= 1, "eta", eta, "within [0, 1]")
        check(steps is None or steps >= 1, "steps", steps, "None or an integer >= 1")
        check(0 < alpha_on < 1, "alpha_on", alpha_on, "within (0, 1)")
        whole = isinstance(rounds, int) and rounds >= 0
        check(whole, "rounds", rounds, "an integer >= 0")
        self.rule, self.eta, self.steps = rule, eta, steps
        self.alpha_on, self.rounds = alpha_on, rounds

    def __call__(
        self,
        canvas: Canvas,
        written: Bool[Tensor, "B T"],
        budget: Int[Tensor, " B"],
        generator: torch.Generator | None = None,
    ) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, " B"]]:
        """Choose what to take back, before anything new is written.

        Args:
            canvas: the rows now.
            written: committed positions of each row's phase, the candidates.
            budget: steps S of each row's phase.
            generator: source of the draws.
        Returns:
            positions taken back, and the rows whose schedule stands still.
        """
        step = canvas.phase_step
        looping = torch.zeros_like(step, dtype=torch.bool)
        if self.rule == "loop":
            begin = (self.alpha_on * budget).minimum(budget - 1.0)
            looping = (step >= begin) & (canvas.held < self.rounds)
        before = step / budget
        after = torch.where(looping, before, (step + 1) / budget)
        largest = ((1 - after) / before.clamp_min(1e-9)).clamp(0, 1)
        chance = self.chance(canvas, written, largest, looping)
        drawn = uniform(written.shape, generator, written.device)
        return written & (drawn < chance), looping

    def chance(self, canvas, written, largest, looping) -> Float[Tensor, "B T"]:
        """sigma of every position."""
        if self.rule == "conf":
            doubt = (-canvas.logprob.exp()).masked_fill(~written, -torch.inf)
            return largest[:, None] * doubt.softmax(1).nan_to_num(0.0)
        if self.rule == "rescale":
            return (self.eta * largest)[:, None]
        sigma = largest.clamp_max(self.eta)
        return (sigma * looping if self.rule == "loop" else sigma)[:, None]
