"""The tokens being denoised, and each row's place in its schedule."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.errors import check


@dataclass
class Canvas:
    """A batch of rows in the making: prompt on the left, `length` new positions right.

    Fields:
        ids: the tokens now, [MASK] where undecided.
        valid: False on padding.
        fixed: True on prompt tokens, which never change.
        prompt_length: first column that decoding appended.
        mask_token_id: the [MASK] token.
        logprob: log-probability of each token when it was written, 0 elsewhere.
        phase: each row's current block (0 without blocks).
        phase_step: steps the row has taken in its phase.
        held: steps the row has spent in a revision loop of its phase.
        steps_taken: steps the row has taken in all.
    """

    ids: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"]
    fixed: Bool[Tensor, "B T"]
    prompt_length: int
    mask_token_id: int
    logprob: Float[Tensor, "B T"]
    phase: Int[Tensor, " B"]
    phase_step: Int[Tensor, " B"]
    held: Int[Tensor, " B"]
    steps_taken: Int[Tensor, " B"]

    @staticmethod
    def start(
        prompt_ids, length: int, mask_token_id: int, attention_mask=None, device=None
    ) -> "Canvas":
        """Prompt, then `length` masks; ragged prompts are padded on the left.

        Raises:
            ValueError: for a negative length, nothing to decode, or an attention mask
                of another shape or with padding elsewhere than on the left.
        """
        check(
            isinstance(length, int) and length >= 0, "length", length, "an integer >= 0"
        )
        prompt, valid = left_padded(prompt_ids, attention_mask)
        prompt, valid = prompt.to(device), valid.to(device)
        rows = len(prompt)
        new = prompt.new_full((rows, length), mask_token_id)
        ids = torch.cat([prompt, new], dim=1)
        valid = torch.cat([valid, valid.new_ones(rows, length)], dim=1)
        undecided = (ids == mask_token_id) & valid
        check(
            bool(undecided.any()), "length", length, ">= 1, or a [MASK] in the prompt"
        )
        zero = prompt.new_zeros(rows)
        return Canvas(
            ids=ids,
            valid=valid,
            fixed=~undecided,
            prompt_length=prompt.shape[1],
            mask_token_id=mask_token_id,
            logprob=torch.zeros(ids.shape, device=ids.device),
            phase=zero,
            phase_step=zero.clone(),
            held=zero.clone(),
            steps_taken=zero.clone(),
        )

    @property
    def masked(self) -> Bool[Tensor, "B T"]:
        """Positions still undecided."""
        return (self.ids == self.mask_token_id) & ~self.fixed

    def enter(self, phase: Int[Tensor, " B"]) -> None:
        """Move rows to their phase; a row that changes phase starts counting anew."""
        same = phase == self.phase
        self.phase = phase
        self.phase_step = self.phase_step * same
        self.held = self.held * same

    def write(self, rows, keep, token, logprob) -> None:
        """Commit the proposed tokens where `keep` says so."""
        self.ids[rows] = torch.where(keep, token, self.ids[rows])
        logprob = logprob.to(self.logprob.dtype)
        self.logprob[rows] = torch.where(keep, logprob, self.logprob[rows])

    def erase(self, rows, back) -> None:
        """Turn the chosen positions into masks again."""
        self.ids[rows] = self.ids[rows].masked_fill(back, self.mask_token_id)
        self.logprob[rows] = self.logprob[rows].masked_fill(back, 0.0)


def left_padded(
    prompt_ids, attention_mask=None
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Prompts as one tensor and which entries are real.

    Args:
        prompt_ids: [P], [B, P], or a list of rows of any lengths.
        attention_mask: [B, P] for a tensor with padding on the left.
    """
    if isinstance(prompt_ids, Tensor):
        ids = prompt_ids.long() if prompt_ids.dim() > 1 else prompt_ids.long()[None]
        check(ids.dim() == 2, "prompt_ids.dim()", prompt_ids.dim(), "1 or 2")
        if attention_mask is None:
            return ids, torch.ones_like(ids, dtype=torch.bool)
        check(
            attention_mask.shape == ids.shape,
            "attention_mask.shape",
            tuple(attention_mask.shape),
            str(tuple(ids.shape)),
        )
        valid = attention_mask.to(ids.device).bool()
        ordered = bool((valid.int().diff(dim=1) >= 0).all())
        check(ordered, "attention_mask", attention_mask, "padding on the left only")
        return ids, valid
    check(attention_mask is None, "attention_mask", "given", "none with a list of rows")
    check(len(prompt_ids) > 0, "prompt_ids", prompt_ids, "at least one row")
    prompts = [torch.as_tensor(row, dtype=torch.long) for row in prompt_ids]
    if prompts[0].dim() == 0:  # one row as a plain list of token ids
        prompts = [torch.as_tensor(prompt_ids, dtype=torch.long)]
    width = max(len(row) for row in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    valid = torch.zeros(len(prompts), width, dtype=torch.bool)
    for index, row in enumerate(prompts):
        ids[index, width - len(row) :] = row
        valid[index, width - len(row) :] = True
    return ids, valid
