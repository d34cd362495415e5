"""One configuration for the tiny models, their autoregressive twin, LLaDA and Dream."""

from transformers import PreTrainedConfig

from dlmlib.errors import check

ATTENTION = ("bidirectional", "causal", "block_causal")


class DLMConfig(PreTrainedConfig):
    """Shape and conventions of a `DiffusionLM`.

    Field names follow transformers' Llama and Qwen2 configurations. Three are ours:

    - `attention`: who sees whom. "bidirectional" for masked diffusion, "causal" for an
      autoregressive model, "block_causal" for block diffusion.
    - `block_length`: the block of "block_causal", in tokens.
    - `shift_logits`: the network predicts the *next* token (autoregressive models, and
      Dream, which was made from one). `DiffusionLM` undoes the shift, so that
      `logits[:, i]` always predicts token i.

    Raises:
        ValueError: if heads do not divide the width, key/value heads do not divide the
            heads, `attention` is unknown or a size is below one.
    Introduced in notebook 02.
    """

    model_type = "dlm"

    vocab_size: int = 32
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    intermediate_size: int = 192
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    tie_word_embeddings: bool = False
    attention: str = "bidirectional"
    block_length: int = 32
    shift_logits: bool = False
    initializer_range: float = 0.02
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
        for name in (*sizes, "num_attention_heads", "num_key_value_heads"):
            value = getattr(self, name)
            check(value >= 1, name, value, "an integer >= 1")
        heads = self.num_attention_heads
        check(
            self.hidden_size % heads == 0 and self.head_dim % 2 == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of 2 x num_attention_heads = {2 * heads}",
        )
        kv_heads = self.num_key_value_heads
        check(
            heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"divides {heads}"
        )
        check(
            self.attention in ATTENTION, "attention", self.attention, f"in {ATTENTION}"
        )
        check(self.block_length >= 1, "block_length", self.block_length, ">= 1")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads
