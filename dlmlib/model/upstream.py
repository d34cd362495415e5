"""LLaDA and Dream checkpoints as they are published, read into `DiffusionLM`.

Only names differ: a config that translates its fields, and a list of renamings that
transformers applies shard by shard while it loads, and backwards when it saves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import logging

from dlmlib.errors import check
from dlmlib.memory import check_room
from dlmlib.model.config import DLMConfig
from dlmlib.model.network import DiffusionLM


def refuse_variants(family: str, only: dict, fields: dict) -> None:
    """Raise ValueError for a field that asks for a network other than `DiffusionLM`."""
    for name, accepted in only.items():
        value = fields.get(name, accepted[0])
        check(value in accepted, f"{family} config {name}", value, f"in {accepted}")


class LLaDAConfig(DLMConfig):
    """LLaDA's config.json (LLaDA-8B, LLaDA 1.5). Bidirectional, logits not shifted.

    Raises:
        ValueError: for a variant of the network that LLaDA's code knows and this one
            does not (ALiBi, other norms, parallel blocks, ...).
    Source: LLaDA (arXiv 2502.09992). Introduced in notebook 06.
    """

    model_type = "llada"
    attribute_map = {  # noqa: RUF012
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "include_qkv_bias": "qkv_bias",
        "weight_tying": "tie_word_embeddings",
        "init_std": "initializer_range",
    }
    only = {  # noqa: RUF012
        "alibi": (False,),
        "rope": (True,),
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "activation_type": ("silu", "swiglu"),
        "include_bias": (False,),
        "bias_for_layer_norm": (False, None),
        "attention_layer_norm": (False,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
        "multi_query_attention": (False, None),
    }

    def __post_init__(self, **kwargs):
        refuse_variants("LLaDA", self.only, kwargs)
        # The output layer has embedding_size rows, which may exceed the vocabulary.
        self.vocab_size = kwargs.get("embedding_size") or self.vocab_size
        super().__post_init__(**kwargs)

    def to_dict(self):
        """Upstream's field names, so that upstream's code reads what we save."""
        back = {ours: theirs for theirs, ours in self.attribute_map.items()}
        return {
            back.get(name, name): value for name, value in super().to_dict().items()
        }


class DreamConfig(DLMConfig):
    """Dream's config.json: Qwen2's layout, q/k/v biases, bidirectional, logits shifted.

    Source: Dream (arXiv 2508.15487). Introduced in notebook 07.
    """

    model_type = "Dream"
    qkv_bias: bool = True
    shift_logits: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    only = {  # noqa: RUF012
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
    }

    def __post_init__(self, **kwargs):
        refuse_variants("Dream", self.only, kwargs)
        kwargs.pop("rope_scaling", None)  # null; transformers warns of its old name
        super().__post_init__(**kwargs)


class LLaDA(DiffusionLM):
    """`DiffusionLM` under LLaDA's tensor names."""

    config_class = LLaDAConfig
    # LLaDOU's order head, which dlmlib.rl.unmasking_policy reads.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^mask_(head|linear|embedding)\.",
        r"^(block|time)_embedding\.",
        r"^norm_out_[12]\.",
    ]


class Dream(DiffusionLM):
    """`DiffusionLM` under Dream's tensor names, which are the same."""

    config_class = DreamConfig


def load_pretrained(
    source: str | Path,
    device: torch.device | None = None,
    progress: bool = True,
    **options,
) -> tuple[DiffusionLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or hub id, in our own format or an official one.

    Nothing of the repository is executed: Dream's tokenizer class is Qwen2's with other
    special tokens, and is read as that. LLaDA's does not name its mask token, its
    config does. Shards are read one after the other, straight to where they belong;
    before the first of them is fetched the room for all is checked.

    Args:
        source: a folder, or a hub id such as "GSAI-ML/LLaDA-8B-Instruct".
        device: where to; None leaves it to `device_map`, or on the CPU.
        progress: show transformers' progress bars.
        options: for transformers: dtype (default: the checkpoint's own), device_map,
            quantization_config, revision, local_files_only, ...
    Returns:
        The model, in evaluation mode, and the tokenizer.
    Raises:
        ValueError: another kind of model, or a checkpoint that does not fit its config.
        OSError: there is nothing at `source`, or no network to fetch it.
        MemoryError: the weights are larger than what is free on `device`; says which
            dtype, quantization or device_map would do.
    Introduced in notebook 06.
    """
    kinds = {c.config_class.model_type: c for c in (DiffusionLM, LLaDA, Dream)}
    try:
        fields, _ = DLMConfig.get_config_dict(source)
    except OSError as error:
        raise OSError(
            f"{source}: no config.json could be read ({error}) Give a folder that "
            "holds the checkpoint; or allow downloads (unset HF_HUB_OFFLINE, check the "
            "network); for a gated repository run `hf auth login` first."
        ) from error
    found = fields.get("model_type")
    check(found in kinds, f"model_type of {source}", found, f"one of {sorted(kinds)}")
    options = {"dtype": "auto", **options}
    if device is not None and "device_map" not in options:
        config = kinds[found].config_class.from_pretrained(source)
        check_room(str(source), config, device, bits_of(config, options))
        if device.type != "cpu":
            options["device_map"] = {"": device}
    with progress_bars(progress):
        model = kinds[found].from_pretrained(source, **options)
    reader = Qwen2Tokenizer if found == "Dream" else AutoTokenizer
    tokenizer = reader.from_pretrained(source)
    if tokenizer.mask_token is None and model.config.mask_token_id is not None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(
            model.config.mask_token_id
        )
    return model.eval(), tokenizer


def bits_of(config: DLMConfig, options: dict) -> int:
    """Bits that a weight will take, by the options of `load_pretrained`."""
    quantized = options.get("quantization_config")
    if quantized is not None:
        known = quantized if isinstance(quantized, dict) else vars(quantized)
        return 4 if known.get("load_in_4bit") or known.get("_load_in_4bit") else 8
    dtype = options["dtype"]
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return 8 * dtype.itemsize


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """transformers' progress bars as asked for, then as they were."""
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    before = logging.is_progress_bar_enabled()
    switch[shown]()
    try:
        yield
    finally:
        switch[before]()


LLADA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_out": "self_attn.o_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def register() -> None:
    """Make `AutoConfig` and `AutoModel` know both model types."""
    for config, model in ((LLaDAConfig, LLaDA), (DreamConfig, Dream)):
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
    blocks = [
        WeightRenaming(
            rf"model.transformer.blocks.(\d+).{theirs}.", rf"model.layers.\1.{ours}."
        )
        for theirs, ours in LLADA_NAMES.items()
    ]
    rest = [
        WeightRenaming(r"model.transformer.wte.", r"model.embed_tokens."),
        WeightRenaming(r"model.transformer.ln_f.", r"model.norm."),
        WeightRenaming(r"model.transformer.ff_out.", r"lm_head."),
    ]
    register_checkpoint_conversion_mapping("llada", [*blocks, *rest])


register()
