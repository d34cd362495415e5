"""Random small networks for the tests of the core, and an independent forward."""

import torch
import torch.nn.functional as F

from dlmlib.model import DiffusionLM, DLMConfig


def tiny_model(seed: int = 0, **overrides) -> DiffusionLM:
    """A random `DiffusionLM` whose weights are large enough for positions to matter."""
    settings = {
        "vocab_size": 13,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "initializer_range": 0.3,
        "mask_token_id": 12,
        **overrides,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DiffusionLM(DLMConfig(**settings)).eval()


def random_ids(rows: int, columns: int, seed: int = 0, below: int = 12) -> torch.Tensor:
    """Token ids without the mask."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(below, (rows, columns), generator=generator)


def turned(x, positions, theta):
    """Rotary positions as complex numbers: x_i + j x_(i + C/2) turns by an angle."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    phase = torch.polar(torch.ones(half).double(), positions[:, None] * speed)
    z = torch.complex(x[..., :half], x[..., half:]) * phase
    return torch.cat([z.real, z.imag], dim=-1)


def by_hand(model, ids, columns=None, stale=None, visible=None):
    """Logits [n, V] of one float64 row, written out without the library's parts.

    Args:
        ids: [n] tokens of the given columns.
        columns: their places; default 0 … n - 1.
        stale: list of (keys, values) [H, T, C] per layer, used outside `columns`.
        visible: [n, T] bool, who may see whom; default all.
    Returns:
        logits and the list of (keys, values) that this forward attended to.
    """
    config, weights = model.config, model.state_dict()
    heads, width = config.num_attention_heads, config.head_dim
    copies = heads // config.num_key_value_heads
    columns = torch.arange(len(ids)) if columns is None else columns

    def norm(x, name):
        scale = (x**2).mean(-1, keepdim=True) + config.rms_norm_eps
        return x / scale.sqrt() * weights[f"{name}.weight"]

    def linear(x, name):
        out = x @ weights[f"{name}.weight"].T
        return out + weights.get(f"{name}.bias", 0.0)

    def per_head(x):
        return x.view(len(x), -1, width).transpose(0, 1)  # [heads, n, C]

    x = weights["model.embed_tokens.weight"][ids]
    attended = []
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm")
        q = turned(
            per_head(linear(h, f"{at}.self_attn.q_proj")), columns, config.rope_theta
        )
        k = turned(
            per_head(linear(h, f"{at}.self_attn.k_proj")), columns, config.rope_theta
        )
        v = per_head(linear(h, f"{at}.self_attn.v_proj"))
        if stale is not None:
            old_k, old_v = stale[layer]
            k = old_k.index_copy(1, columns, k)
            v = old_v.index_copy(1, columns, v)
        attended.append((k, v))
        k, v = (part.repeat_interleave(copies, dim=0) for part in (k, v))
        scores = q @ k.transpose(1, 2) / width**0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(mixed, f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        gate = linear(h, f"{at}.mlp.gate_proj")
        inner = gate * torch.sigmoid(gate) * linear(h, f"{at}.mlp.up_proj")
        x = x + linear(inner, f"{at}.mlp.down_proj")
    x = norm(x, "model.norm")
    if config.shift_logits:
        x = F.pad(x, (0, 0, 1, 0))[:-1] + F.pad(x[:1], (0, 0, 0, len(x) - 1))
    return linear(x, "lm_head"), attended
