"""The parts of the network: norm, rotary attention, gated MLP, block."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dlmlib.model.config import DLMConfig
from dlmlib.model.kv_cache import KVCache


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean square taken in at least float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rope_angles(
    position_ids: Int[Tensor, "B T"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "B 1 T C"], Float[Tensor, "B 1 T C"]]:
    """Cosine and sine of position x theta^(-2i/C), repeated for the two halves."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponent  # [B,1,T,C/2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B H T C"], cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-rotation layout, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the mask says who sees whom."""

    def __init__(self, config: DLMConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, bias = config.hidden_size, config.qkv_bias
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, rope, mask, cache: KVCache | None, start: int, asked: slice):
        def heads(flat):  # [B, n, H C] -> [B, H, n, C]
            return flat.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        here = [part[:, :, asked] for part in rope]
        query = rotate(heads(self.q_proj(x[:, asked])), *here)
        key = rotate(heads(self.k_proj(x)), *rope)
        value = heads(self.v_proj(x))
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, asked]
        if cache is not None:
            key, value = cache.update(self.layer, key, value, start)
        grouped = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=grouped
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DLMConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """Pre-norm Transformer block; returns the columns that are asked for."""

    def __init__(self, config: DLMConfig, layer: int):
        super().__init__()
        norm = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache=None, start=0, asked=slice(None)):
        normed = self.input_layernorm(x)
        x = x[:, asked] + self.self_attn(normed, rope, mask, cache, start, asked)
        return x + self.mlp(self.post_attention_layernorm(x))
