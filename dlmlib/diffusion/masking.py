"""The forward process of masked diffusion, and its exact reverse."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.device import uniform
from dlmlib.errors import check


@dataclass(frozen=True)
class Schedule:
    """alpha(t), the chance that a token is still visible at time t in [0, 1].

    alpha(0) = 1, alpha(1) = 0, falling in between. `slope` is d alpha / dt.
    """

    name: str
    alpha: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]

    def weight(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """NELBO weight -alpha'(t) / (1 - alpha(t)); 1/t for the linear schedule."""
        return -self.slope(t) / (1 - self.alpha(t))


def named_schedule(name: str | Schedule, power: float = 2.0) -> Schedule:
    """alpha by name: "linear" 1 - t, "cosine" cos(pi t / 2), "polynomial" 1 - t^power.

    Raises:
        ValueError: for an unknown name or a power <= 0.
    Source: MDLM (arXiv 2406.07524), eq. 7-11 and appendix on schedules. The NELBO does
    not depend on the choice; its estimator's variance does. Introduced in notebook 02.
    """
    if isinstance(name, Schedule):
        return name
    check(power > 0, "power", power, "> 0")
    half = math.pi / 2
    known = {
        "linear": (lambda t: 1 - t, lambda t: -torch.ones_like(t)),
        "cosine": (lambda t: (half * t).cos(), lambda t: -half * (half * t).sin()),
        "polynomial": (lambda t: 1 - t**power, lambda t: -power * t ** (power - 1)),
    }
    check(name in known, "schedule", name, f"one of {sorted(known)}")
    return Schedule(name, *known[name])


def mask_tokens(
    input_ids: Int[Tensor, "B T"],
    visible: Float[Tensor, " B"],
    mask_token_id: int,
    maskable: Bool[Tensor, "B T"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B T"]:
    """Draw x_t ~ q(x_t | x_0): each token is hidden on its own with chance 1 - alpha.

    Args:
        input_ids: clean tokens x_0.
        visible: alpha(t) of each row, in [0, 1].
        mask_token_id: what a hidden token becomes.
        maskable: False where a token is never hidden (a prompt); default all True.
        generator: source of the draw.
    Raises:
        ValueError: if alpha lies outside [0, 1].
    Source: MDLM (arXiv 2406.07524), eq. 1-3. Introduced in notebook 01.
    """
    inside = bool(((visible >= 0) & (visible <= 1)).all())
    check(inside, "visible", visible, "chances within [0, 1]")
    hidden = uniform(input_ids.shape, generator, input_ids.device) >= visible[:, None]
    if maskable is not None:
        hidden &= maskable
    return input_ids.masked_fill(hidden, mask_token_id)


def posterior(
    t: Float[Tensor, "*B"], s: Float[Tensor, "*B"], alpha: Schedule
) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """q(x_s | x_t = [MASK], x_0): chance to stay hidden, and to be revealed as x_0.

    stay = (1 - alpha_s) / (1 - alpha_t),  reveal = (alpha_s - alpha_t) / (1 - alpha_t).
    A visible token stays as it is with certainty.

    Args:
        t: later time, in (0, 1].
        s: earlier time, in [0, t].
        alpha: the schedule.
    Raises:
        ValueError: unless 0 <= s <= t <= 1 and t > 0.
    Source: MDLM (arXiv 2406.07524), eq. 6. Introduced in notebook 01.
    """
    ordered = bool(((s >= 0) & (s <= t) & (t > 0) & (t <= 1)).all())
    check(ordered, "(t, s)", (t, s), "0 <= s <= t <= 1 and t > 0")
    hidden = 1 - alpha.alpha(t)
    return (1 - alpha.alpha(s)) / hidden, (alpha.alpha(s) - alpha.alpha(t)) / hidden


def unmask_tokens(
    noised: Int[Tensor, "B T"],
    clean: Int[Tensor, "B T"],
    reveal: Float[Tensor, " B"],
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B T"]:
    """Draw x_s ~ q(x_s | x_t, x_0): reveal each hidden token with chance `reveal`."""
    hidden = noised == mask_token_id
    shown = uniform(noised.shape, generator, noised.device) < reveal[:, None]
    return torch.where(hidden & shown, clean, noised)
