"""Training objectives: a bound on -log p(x), its estimators, and the AR baseline."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dlmlib.device import uniform
from dlmlib.diffusion.masking import Schedule, named_schedule
from dlmlib.errors import check
from dlmlib.model.call import logits_at

TIMES = ("iid", "low_discrepancy", "l_of_L")


class NELBO:
    """Negative evidence lower bound of a masked diffusion model, in nats per row.

    -log p(x_0) <= E_t E_{x_t} [ w(t) sum_{i hidden} -log p(x_0^i | x_t) ],
    w(t) = -alpha'(t) / (1 - alpha(t)), t ~ U(0, 1).

    The expectation is one sample a row; `times` says how it is drawn:
    - "iid": t independent for every row (LLaDA).
    - "low_discrepancy": one uniform draw, then evenly spaced over the batch (MDLM).
    - "l_of_L": exactly l of the L maskable tokens, l uniform in 1 … L and evenly spaced
      over the batch, weight L / l (LLaDA's likelihood). Needs no schedule.
    All three estimate the same number; they differ in variance.

    Corruption and loss are two calls, so that several processes can draw the noise of
    one global batch and each take its share.

    Args:
        mask_token_id: the [MASK] token.
        schedule: "linear", "cosine", "polynomial" or a `Schedule`.
        times: see above.
        eps: smallest t drawn; keeps the weight finite. With eps the linear estimator
            misses the times below it, a share of about eps of the bound.
    Raises:
        ValueError: for an unknown `times` or schedule, or eps outside (0, 1).
    Source: MDLM (arXiv 2406.07524), eq. 10-11; LLaDA (arXiv 2502.09992), eq. 3 and 6.
    Introduced in notebook 02.
    """

    def __init__(
        self,
        mask_token_id: int,
        schedule: str | Schedule = "linear",
        times: str = "low_discrepancy",
        eps: float = 1e-3,
    ):
        check(times in TIMES, "times", times, f"one of {TIMES}")
        check(0 < eps < 1, "eps", eps, "within (0, 1)")
        self.mask_token_id, self.times, self.eps = mask_token_id, times, eps
        self.schedule = named_schedule(schedule)

    def corrupt(
        self, batch: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw one corrupted copy of each row.

        Args:
            batch: input_ids [B, T]; optional maskable [B, T] (False on a prompt) and
                attention_mask [B, T].
        Returns:
            the batch with noisy_ids [B, T], weight [B] and tokens [B], the number of
            maskable tokens.
        """
        ids = batch["input_ids"]
        maskable = maskable_of(batch)
        tokens = maskable.sum(1)
        draw = uniform(ids.shape, generator, ids.device)
        spread = self.spread(len(ids), generator, ids.device)
        if self.times == "l_of_L":
            count = ((spread * tokens).long() + 1).minimum(tokens).clamp_min(1)
            rank = draw.masked_fill(~maskable, 2).argsort(1).argsort(1)
            hidden, weight = rank < count[:, None], tokens / count
        else:
            t = (1 - self.eps) * spread + self.eps
            hidden = draw >= self.schedule.alpha(t)[:, None]
            weight = (1 - self.eps) * self.schedule.weight(t)
            # alpha(t) may round to 1: then nothing is hidden, and the weight infinite.
            weight = weight.masked_fill(~hidden.any(1), 0.0)
        noisy = ids.masked_fill(hidden & maskable, self.mask_token_id)
        return {**batch, "noisy_ids": noisy, "weight": weight, "tokens": tokens}

    def spread(self, rows: int, generator, device) -> Float[Tensor, " B"]:
        """One number in [0, 1) a row: independent, or evenly spaced over the batch."""
        if self.times == "iid":
            return uniform((rows,), generator, device)
        shift = uniform((1,), generator, device)
        return (shift + torch.arange(rows, device=device) / rows) % 1

    def __call__(self, model, noised: dict[str, Tensor]) -> Float[Tensor, " B"]:
        """Weighted cross-entropy over the hidden tokens of each row, in nats.

        Args:
            model: anything that maps input_ids to `.logits`; a `DiffusionLM` computes
                them for the hidden positions only.
            noised: what `corrupt` returned.
        """
        noisy, clean = noised["noisy_ids"], noised["input_ids"]
        padding = noised.get("attention_mask")
        total = row_nats(model, noisy, clean, noisy != clean, padding)
        return noised["weight"].to(total.dtype) * total


class AutoregressiveNLL:
    """Negative log-likelihood of a causal model, in nats per row: the AR baseline.

    -log p(x) = sum_i -log p(x_i | x_<i), exactly, without any noise.

    The first column is given: nothing stands left of it.

    Introduced in notebook 07.
    """

    def corrupt(
        self, batch: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Mark what is scored; nothing is drawn.

        Args:
            batch: as for `NELBO`; "maskable" says which tokens count.
        Returns:
            the batch with scored [B, T] and tokens [B], their number.
        """
        scored = maskable_of(batch).clone()
        scored[:, 0] = False
        return {**batch, "scored": scored, "tokens": scored.sum(1)}

    def __call__(self, model, noised: dict[str, Tensor]) -> Float[Tensor, " B"]:
        """Cross-entropy summed over the scored tokens of each row, in nats."""
        clean, scored = noised["input_ids"], noised["scored"]
        return row_nats(model, clean, clean, scored, noised.get("attention_mask"))


def maskable_of(batch: dict[str, Tensor]) -> Bool[Tensor, "B T"]:
    """The tokens that count: not given, and not padding."""
    ids = batch["input_ids"]
    maskable = batch.get("maskable", torch.ones_like(ids, dtype=torch.bool)).bool()
    if "attention_mask" in batch:
        maskable = maskable & batch["attention_mask"].bool()
    return maskable


def row_nats(
    model, seen, clean, scored, attention_mask, weight=None
) -> Float[Tensor, " B"]:
    """Cross-entropy against `clean` at the `scored` positions, summed over each row.

    `weight` [B, T], if given, multiplies each token's.
    """
    logits = logits_at(model, seen, scored, attention_mask)  # [N, V]
    nats = F.cross_entropy(logits.float(), clean[scored], reduction="none")
    if weight is not None:
        nats = nats * weight[scored]
    rows = scored.nonzero()[:, 0]
    return nats.new_zeros(len(clean)).index_add(0, rows, nats)
