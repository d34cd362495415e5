"""The official checkpoints and answers, loaded into `DiffusionLM`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dlmlib.model import DiffusionLM, DLMConfig

GOLDENS = Path(__file__).parent / "goldens"

LLADA_CONFIG = {
    "embedding_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "include_qkv_bias": "qkv_bias",
    "weight_tying": "tie_word_embeddings",
}
SAME_IN_ALL = ("rope_theta", "rms_norm_eps", "mask_token_id", "eos_token_id")
DREAM_CONFIG = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "tie_word_embeddings",
)
LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
LLADA_TOP = {
    "wte.weight": "model.embed_tokens.weight",
    "ln_f.weight": "model.norm.weight",
    "ff_out.weight": "lm_head.weight",
}


def config_of(theirs: dict) -> DLMConfig:
    """Our configuration of an official LLaDA or Dream config.json."""
    same = {name: theirs[name] for name in SAME_IN_ALL}
    if theirs["model_type"] == "llada":
        named = {ours: theirs[name] for name, ours in LLADA_CONFIG.items()}
        return DLMConfig(**same, **named)
    named = {name: theirs[name] for name in DREAM_CONFIG}
    return DLMConfig(**same, **named, qkv_bias=True, shift_logits=True)


def our_name(name: str) -> str:
    """Our name of an official tensor; Dream's are ours already."""
    if not name.startswith("model.transformer."):
        return name
    name = name.removeprefix("model.transformer.")
    block = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block is None:
        return LLADA_TOP[name]
    layer, part, kind = block.groups()
    return f"model.layers.{layer}.{LLADA_BLOCK[part]}.{kind}"


@dataclass
class Golden:
    """A tiny official checkpoint and what the official programs answered for it."""

    model: DiffusionLM
    arrays: dict[str, torch.Tensor]
    calls: dict[str, dict]

    @classmethod
    def load(cls, name: str) -> "Golden":
        folder = GOLDENS / name
        theirs = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        model = DiffusionLM(config_of(theirs))
        model.load_state_dict({our_name(key): w for key, w in weights.items()})
        with np.load(folder / "golden.npz") as packed:
            arrays = {key: torch.from_numpy(packed[key]) for key in packed.files}
        ids = (torch.int16, torch.int64)
        arrays = {k: a.long() if a.dtype in ids else a for k, a in arrays.items()}
        programs = json.loads((folder / "calls.json").read_text())
        calls = {
            f"{program}/{call['name']}": call
            for program, listed in programs.items()
            for call in listed["calls"]
        }
        return cls(model.eval(), arrays, calls)

    def of(self, call: str) -> dict[str, torch.Tensor]:
        """The arrays of one call by their last name."""
        return {
            key.removeprefix(call + "/"): array
            for key, array in self.arrays.items()
            if key.startswith(call + "/")
        }


@pytest.fixture(scope="session")
def llada() -> Golden:
    return Golden.load("llada_a")


@pytest.fixture(scope="session")
def dream() -> Golden:
    return Golden.load("dream_a")
