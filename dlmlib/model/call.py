"""Call any module that maps `input_ids` to `.logits`, using what it offers."""

import inspect

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.errors import check


def accepts(model, argument: str) -> bool:
    """Whether the model's forward names this argument, seen through wrappers.

    Data-parallel wrappers keep the model in `.module`, peft behind `get_base_model`.
    """
    model = unwrapped(model)
    call = getattr(model, "forward", model)
    return argument in inspect.signature(call).parameters


def unwrapped(model):
    """The model inside data-parallel wrappers and peft."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logits_at(
    model,
    input_ids: Int[Tensor, "B T"],
    positions: Bool[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    **options,
) -> Float[Tensor, "N V"]:
    """Logits of the chosen positions, in row-major order.

    A model with `logit_positions` computes only these; of any other model they are
    selected. With padding, positions count from each row's first real token where the
    model takes `position_ids`.

    Args:
        model: a `DiffusionLM`, a BERT, an official LLaDA, a table of conditionals.
        input_ids: the canvas.
        positions: True where logits are wanted.
        attention_mask: False or 0 on padding; None if there is none.
        options: more arguments of the model's forward, such as a cache.
    Raises:
        ValueError: if there is padding and the model takes no `attention_mask`.
    Introduced in notebook 03.
    """
    options = {**padding_options(model, attention_mask), **options}
    if accepts(model, "logit_positions"):
        return model(input_ids, logit_positions=positions, **options).logits
    return model(input_ids, **options).logits[positions]


def padding_options(model, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """The arguments of the model's forward that say where padding is.

    Raises:
        ValueError: if there is padding and the model takes no `attention_mask`.
    """
    if attention_mask is None:
        return {}
    check(
        accepts(model, "attention_mask"),
        "model",
        type(model).__name__,
        "a forward with attention_mask, since rows are padded",
    )
    options = {"attention_mask": attention_mask}
    if accepts(model, "position_ids"):
        options["position_ids"] = positions_of(attention_mask)
    return options


def positions_of(valid: Tensor) -> Int[Tensor, "B T"]:
    """Rotary positions counted from each row's first real token."""
    return (valid.long().cumsum(1) - 1).clamp_min(0)


def mask_token_of(model, mask_token_id: int | None = None) -> int:
    """The [MASK] token given, or the one in the model's config.

    Raises:
        ValueError: if neither says.
    """
    if mask_token_id is None:
        model = unwrapped(model)
        mask_token_id = getattr(getattr(model, "config", model), "mask_token_id", None)
    check(
        mask_token_id is not None,
        "mask_token_id",
        mask_token_id,
        "a token id, since the model's config names none",
    )
    return mask_token_id
