"""One Transformer for every model of the series: RMSNorm, RoPE, SwiGLU, GQA."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dlmlib.errors import check
from dlmlib.model.config import DLMConfig
from dlmlib.model.kv_cache import KVCache
from dlmlib.model.layers import Block, RMSNorm, rope_angles


@dataclass
class DLMOutput(ModelOutput):
    """What a forward returns.

    logits: [B, T, V], or [N, V] for N chosen positions; row i is about token i.
    hidden_states: [B, T, D] before each block and the normalised end, if asked for.
    states: what `lm_head` maps to `logits`, if asked for in their place.
    """

    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    states: Tensor | None = None


class Backbone(nn.Module):
    """Embedding, blocks and final norm: everything below the output layer."""

    def __init__(self, config: DLMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def attention_mask_of(
    config: DLMConfig, columns: int, start: int, valid: Tensor | None, device
) -> Bool[Tensor, "B 1 n T"] | None:
    """True where query column start + i may see key column j; None if everywhere.

    Padding hides keys. A query without any visible key (padding itself, under a causal
    mask) sees its own column, since a softmax over nothing is not a number.
    """
    total = valid.shape[1] if valid is not None else start + columns
    mask = None if valid is None else valid[:, None, None, :].bool()
    if config.attention == "bidirectional":
        return mask
    column = torch.arange(total, device=device)[None]  # [1, T]
    place = column if valid is None else valid.long().cumsum(1) - 1  # [B, T]
    size = config.block_length if config.attention == "block_causal" else 1
    block = place // size
    order = block[:, None, start : start + columns, None] >= block[:, None, None, :]
    if mask is None:
        return order
    own = column[0, start : start + columns, None] == column
    return (order & mask) | own


class DiffusionLM(PreTrainedModel):
    """A language model whose `logits[:, i]` predicts token i.

    Bidirectional and trained with `NELBO` it is a masked diffusion model; causal with
    `shift_logits` it is the autoregressive twin of the same shape.

    Source: LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487), which differ from one
    another and from the tiny models only in the config. Introduced in notebook 02.
    """

    config_class = DLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DLMConfig):
        super().__init__(config)
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder, *args, **options):
        """As transformers', but from safetensors only and never with random weights.

        Raises:
            ValueError: for tensors that the checkpoint lacks, adds or has in another
                shape.
        """
        wants_info = options.pop("output_loading_info", False)
        options = {"use_safetensors": True, "ignore_mismatched_sizes": True, **options}
        try:
            model, info = super().from_pretrained(
                folder, *args, output_loading_info=True, **options
            )
        except SafetensorError as error:
            raise ValueError(f"{folder}: unreadable safetensors ({error})") from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(map(str, info[problem]))
            check(not names, problem, names, f"none in {folder}, whose config differs")
        return (model, info) if wants_info else model

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: Int[Tensor, "B n"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "B n"] | None = None,
        logit_positions: Tensor | None = None,
        cache: KVCache | None = None,
        start: int = 0,
        output_hidden_states: bool = False,
        states_only: bool = False,
    ) -> DLMOutput:
        """Predict the token at every position, or at chosen ones only.

        Args:
            input_ids: tokens of the columns [start, start + n).
            attention_mask: [B, T] over all T columns, False or 0 on padding.
            position_ids: rotary positions; default start … start + n - 1.
            logit_positions: [B, n] bool, or flat indices [N] into B x n: the output
                layer, the dearest part of a large vocabulary, runs for these alone.
            cache: overwritten in the columns given here; the others are reused. With
                `shift_logits`, feed one column more on the left than is needed: the
                first column of a cached forward has no left neighbour to read from.
            start: first column of `input_ids` within the cache.
            output_hidden_states: also return the states [B, n, D], see `DLMOutput`.
            states_only: leave the output layer to the caller, who can apply `lm_head`
                to a few positions at a time.
        Returns:
            logits [B, n, V], or [N, V] in row-major order of the chosen positions.
        Raises:
            ValueError: for a mask of the wrong shape or columns outside the cache.
        """
        columns = input_ids.shape[1]
        check(start == 0 or cache is not None, "start", start, "0 without a cache")
        if position_ids is None:
            position_ids = torch.arange(
                start, start + columns, device=input_ids.device
            ).expand(input_ids.shape)
        if attention_mask is not None:
            total = cache.length if cache is not None else columns
            check(
                attention_mask.shape == (len(input_ids), total),
                "attention_mask.shape",
                tuple(attention_mask.shape),
                f"({len(input_ids)}, {total})",
            )
        asked = self.asked_columns(logit_positions, output_hidden_states)
        x, states = self.hidden(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            start,
            output_hidden_states,
            asked,
        )
        valid = None
        if attention_mask is not None:
            valid = attention_mask[:, start : start + columns][:, asked].bool()
        if logit_positions is not None and logit_positions.dtype == torch.bool:
            logit_positions = logit_positions[:, asked]
        x = self.states_at(x, logit_positions, valid)
        if states_only:
            return DLMOutput(states=x, hidden_states=states)
        return DLMOutput(self.lm_head(x), states)

    def asked_columns(self, positions: Tensor | None, keep: bool) -> slice:
        """Columns from the first to the last that logits at `positions` come from.

        The last block computes nothing else, unless its states are to be kept.
        """
        if keep or positions is None or positions.dtype != torch.bool:
            return slice(None)
        columns = positions.any(0).nonzero()[:, 0].tolist() or [0]
        return slice(max(columns[0] - self.config.shift_logits, 0), columns[-1] + 1)

    def hidden(
        self, input_ids, attention_mask, position_ids, cache, start, keep, asked
    ):
        """Final normalised states [B, n, D], and those before each block if `keep`."""
        config, body = self.config, self.model
        x = body.embed_tokens(input_ids)
        if cache is not None and attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), cache.length)
        mask = attention_mask_of(
            config, input_ids.shape[1], start, attention_mask, x.device
        )
        rope = rope_angles(position_ids, config.head_dim, config.rope_theta)
        states = []
        for depth, block in enumerate(body.layers, start=1):
            if keep:
                states.append(x)
            last = depth == len(body.layers)  # looped, a block may stand twice
            x = block(x, rope, mask, cache, start, asked if last else slice(None))
        x = body.norm(x)
        return x, (*states, x) if keep else None

    def states_at(
        self,
        x: Float[Tensor, "B n D"],
        positions: Tensor | None,
        valid: Tensor | None = None,
    ) -> Float[Tensor, "*N D"]:
        """The states that predict `positions` (all if None)."""
        if self.config.shift_logits:
            left = torch.cat([x[:, :1], x[:, :-1]], dim=1)
            if valid is not None:  # the first real token has no left neighbour
                first = valid & (valid.long().cumsum(1) == 1)
                left = torch.where(first[..., None], x, left)
            x = left
        if positions is not None:
            if positions.dtype == torch.bool:
                positions = positions.flatten().nonzero()[:, 0]
            x = x.flatten(0, 1)[positions]
        return x
