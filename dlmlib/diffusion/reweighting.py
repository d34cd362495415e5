"""Token weights that replace the bound's: what each hidden token counts in training."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dlmlib.diffusion.masking import Schedule
from dlmlib.diffusion.objective import NELBO, row_nats
from dlmlib.errors import check


class CART:
    """Cross-entropy in which a hidden token counts by the visible tokens around it.

    sum_{i hidden} w_i (-log p(x_0^i | x_t)),
    w_i = sum_{j visible} Geo(|i - j|) / 2,  Geo(d) = p (1 - p)^(d - 1).

    This is a reweighting and no bound on -log p(x). Without a prompt the mean weight of
    a hidden token at time t is at most 1 - t, in place of 1 / t: nearly empty canvases
    count little, an empty one not at all. Compare models by `NELBO`.

    It is used like `NELBO`. `fit` divides by the maskable tokens; upstream divides by
    the hidden ones, on average half as many.

    Args:
        mask_token_id: the [MASK] token.
        p: sharpness in (0, 1]; 1 counts the two neighbours only, a small p looks far.
        schedule, times: how noise is drawn, as for `NELBO`.
    Raises:
        ValueError: p outside (0, 1], or as `NELBO`.
    Source: context-adaptive token-level noise rescheduling of Dream (arXiv 2508.15487).
    Introduced in notebook 07.
    """

    def __init__(
        self,
        mask_token_id: int,
        p: float = 0.1,
        schedule: str | Schedule = "linear",
        times: str = "low_discrepancy",
    ):
        check(0 < p <= 1, "p", p, "within (0, 1]")
        self.p, self.noise = p, NELBO(mask_token_id, schedule, times)

    def corrupt(
        self, batch: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Noise as `NELBO` draws it, with weight [B, T] in place of its weight [B].

        Args:
            batch: as for `NELBO`; a prompt is visible, padding is not.
        """
        noised = self.noise.corrupt(batch, generator)
        hidden = noised["noisy_ids"] != noised["input_ids"]
        visible = ~hidden
        if "attention_mask" in batch:
            visible = visible & batch["attention_mask"].bool()
        return {**noised, "weight": context_weights(hidden, visible, self.p)}

    def __call__(self, model, noised: dict[str, Tensor]) -> Float[Tensor, " B"]:
        """Weighted cross-entropy over the hidden tokens of each row, in nats."""
        noisy, clean = noised["noisy_ids"], noised["input_ids"]
        padding, weight = noised.get("attention_mask"), noised["weight"]
        return row_nats(model, noisy, clean, noisy != clean, padding, weight)


def context_weights(
    hidden: Bool[Tensor, "B T"], visible: Bool[Tensor, "B T"], p: float
) -> Float[Tensor, "B T"]:
    """w_i of `CART` at the hidden positions, 0 elsewhere.

    Args:
        hidden: the masks that are scored.
        visible: the tokens that can be read; padding is neither.
        p: sharpness in (0, 1].
    """
    place = torch.arange(hidden.shape[1], device=hidden.device)
    distance = (place[:, None] - place).abs()
    near = 0.5 * p * (1 - p) ** (distance - 1).clamp_min(0).float()
    near = near.masked_fill(distance == 0, 0.0)  # [T, T]
    return (visible.float() @ near) * hidden
