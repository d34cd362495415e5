"""From an autoregressive model to a diffusion model: the same weights, read anew."""

import copy

from dlmlib.errors import check
from dlmlib.model.network import DiffusionLM


def to_diffusion(
    model: DiffusionLM, shift_logits: bool = True, mask_token_id: int | None = None
) -> DiffusionLM:
    """A bidirectional copy of a causal model, to be trained further with `NELBO`.

    No weight changes. Every position now sees the whole row, and with `shift_logits`
    token i is still read from column i - 1, where a next-token model computes it.

    Args:
        model: trained on next tokens.
        shift_logits: False reads token i from column i, as LLaDA does.
        mask_token_id: a token of the vocabulary that stands for [MASK]; default the
            model's own.
    Returns:
        A new model, in evaluation mode; the given one stays as it is.
    Raises:
        ValueError: the model is not causal, or there is no token for [MASK].

    Source: Dream (arXiv 2508.15487), section 3. Introduced in notebook 07.
    """
    config = copy.deepcopy(model.config)
    check(config.attention == "causal", "model", config.attention, "causal attention")
    if mask_token_id is not None:
        config.mask_token_id = mask_token_id
    known = config.mask_token_id is not None
    inside = known and 0 <= config.mask_token_id < config.vocab_size
    expected = f"a token within [0, {config.vocab_size})"
    check(inside, "mask_token_id", config.mask_token_id, expected)
    config.attention, config.shift_logits = "bidirectional", shift_logits
    adapted = DiffusionLM(config).to(model.device, model.dtype)
    adapted.load_state_dict(model.state_dict())
    return adapted.eval()
