"""LoRA: train small adapters, and get the reference policy by switching them off."""

import torch

from dlmlib.errors import check

TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


def add_lora(
    model,
    rank: int = 128,
    alpha: float = 64.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = TARGETS,
    seed: int = 0,
):
    """Freeze a `DiffusionLM` and add trainable low-rank updates to its linear maps.

    W x becomes W x + (alpha / rank) B A x with A [rank, in] and B [out, rank] = 0, so
    that nothing changes before the first update. `fit` trains and stores the adapters
    alone, `save_pretrained` writes them in peft's format, `load_adapter` reads them.

    Args:
        model: changed in place.
        rank, alpha: defaults of d1's program.
        dropout: on the adapter's input while training; any noise between two forwards
            shows up in the policy's ratio.
        targets: names of the maps that get one.
        seed: of the first A.
    Returns:
        The model.
    Raises:
        ValueError: for a rank below 1, or a target that the model does not have.
        ImportError: without the package `peft`.
    Source: LoRA (arXiv 2106.09685), eq. 3; d1 (arXiv 2504.12216) for the numbers.
    Introduced in notebook 20.
    """
    from peft import LoraConfig  # only adapters need it

    check(isinstance(rank, int) and rank >= 1, "rank", rank, "an integer >= 1")
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [name for name in targets if name not in there]
    check(not unknown, "targets", unknown, "names of the model's linear maps")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from torch's global generator
        torch.manual_seed(seed)
        model.add_adapter(config)
    return model


class WithoutLora:
    """The model as it was before `add_lora`: the same weights, adapters switched off.

    A reference policy that takes no memory of its own.

    Args:
        model: with adapters, which are on again after every call.
    Raises:
        ValueError: for a model without adapters.
    Introduced in notebook 20.
    """

    def __init__(self, model):
        check(has_lora(model), "model", type(model).__name__, "one with adapters")
        self.module = model  # the name by which wrappers are seen through

    def __call__(self, *args, **options):
        self.module.disable_adapters()
        try:
            return self.module(*args, **options)
        finally:
            self.module.enable_adapters()

    def parameters(self):
        """Of the model, adapters included."""
        return self.module.parameters()


def has_lora(model) -> bool:
    """Whether the model carries adapters."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))
