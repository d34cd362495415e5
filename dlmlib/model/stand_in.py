"""Small folders in the exact layout of LLaDA's and Dream's repositories.

`dlm.load` reads them on the path of the 8B models: config, sharded weights with an
index, generation config, tokenizer files and chat template. Only the numbers are small.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlmlib.errors import check
from dlmlib.model.network import DiffusionLM
from dlmlib.model.upstream import Dream, LLaDA, progress_bars

TEXT = (
    "user\n\nassistant\n\nsystem\n A masked diffusion model hides some words of a text "
    "and learns to write them back, given the words that it can see. The answer to two "
    "plus two is four, and the answer to a naïve question is often a short one. "
)

LLADA_SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>")
LLADA_SPECIAL += ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLADA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DREAM_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DREAM_SPECIAL += ("<|beginoftext|>", "<|mask|>")
DREAM_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Fields that upstream publishes and `DiffusionLM` has one answer to.
LLADA_FIXED = dict(
    activation_type="silu",
    alibi=False,
    alibi_bias_max=8.0,
    architectures=["LLaDAModelLM"],
    attention_dropout=0.0,
    attention_layer_norm=False,
    attention_layer_norm_with_affine=True,
    auto_map={
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    bias_for_layer_norm=False,
    block_group_size=1,
    block_type="llama",
    embedding_dropout=0.0,
    flash_attention=False,
    include_bias=False,
    include_qkv_bias=False,
    init_cutoff_factor=None,
    init_device="meta",
    init_fn="mitchell",
    init_std=0.02,
    input_emb_norm=False,
    layer_norm_type="rms",
    layer_norm_with_affine=True,
    mlp_ratio=4,
    model_type="llada",
    multi_query_attention=None,
    precision="amp_bf16",
    residual_dropout=0.0,
    rope=True,
    rope_full_precision=True,
    scale_logits=False,
    use_cache=False,
    weight_tying=False,
)
DREAM_FIXED = dict(
    architectures=["DreamModel"],
    attention_dropout=0.0,
    auto_map={
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    hidden_act="silu",
    initializer_range=0.02,
    max_window_layers=28,
    model_type="Dream",
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=False,
    use_cache=False,
    use_sliding_window=False,
)


def byte_pairs(text: str, split) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE in which every word of `text` is one token.

    Nothing is counted: each new word gets the merges that it still needs, at the end of
    the list, so the same text makes the same vocabulary everywhere. Other words fall
    into pieces, at worst into bytes.

    Args:
        text: whose words become tokens.
        split: a pre-tokenizer; cuts text into words in byte letters.
    Returns:
        Vocabulary (256 bytes first) and merges.
    """
    vocabulary = {c: i for i, c in enumerate(sorted(split.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word, _ in split.pre_tokenize_str(text):
        pieces = [t.value for t in models.BPE(vocabulary, merges).tokenize(word)]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    return vocabulary, merges


def llada_tokenizer(text: str = TEXT) -> PreTrainedTokenizerFast:
    """A tokenizer of LLaDA's kind, with its special tokens and chat format.

    Args:
        text: whose words are single tokens.
    Introduced in notebook 06.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = Tokenizer(models.BPE(*byte_pairs(text, split)))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    backend.add_special_tokens(list(LLADA_SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mdm_mask|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = LLADA_CHAT
    return tokenizer


def write(
    folder: str | Path,
    family: str = "llada",
    *,
    model: DiffusionLM | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    text: str = TEXT,
    shards: int = 3,
    seed: int = 0,
    **sizes,
) -> Path:
    """Write a small checkpoint as its upstream publishes the large one.

    Args:
        folder: where to; made if need be.
        family: "llada" or "dream".
        model: whose weights to store; None for random ones.
        tokenizer: the model's (LLaDA only); None to make one of `text`.
        text: whose words the tokenizer knows.
        shards: about how many files share the weights.
        seed: of random weights.
        sizes: fields of `DLMConfig` for a random model, such as hidden_size.
    Returns:
        The folder.
    Raises:
        ValueError: another family, fewer shards than one, or a tokenizer for Dream.
    Introduced in notebook 06.
    """
    check(family in ("llada", "dream"), "family", family, "'llada' or 'dream'")
    check(shards >= 1, "shards", shards, "an integer >= 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if family == "llada":
        fields = write_llada_tokenizer(folder, tokenizer or llada_tokenizer(text))
        fields["rope_theta"] = 500000.0  # as the 8B model's; Dream's is the default
    else:
        check(
            tokenizer is None, "tokenizer", "given", "None for Dream, which gets text"
        )
        fields = write_dream_tokenizer(folder, text)
        fields["num_key_value_heads"] = 2  # grouped queries, as Dream's
    if model is not None:
        sizes = {name: getattr(model.config, name) for name in SHAPE} | sizes
    kind = LLaDA if family == "llada" else Dream
    with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
        torch.manual_seed(seed)
        stored = kind(kind.config_class(**{**fields, **sizes}))
    if model is not None:
        stored.to(model.dtype).load_state_dict(model.state_dict())
    size = sum(p.nbytes for p in stored.parameters())
    with progress_bars(False):
        stored.save_pretrained(folder, max_shard_size=max(1, -(-size // shards)))
    write_configs(folder, family, stored.config, stored.dtype)
    return folder


SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
)


def write_configs(folder: Path, family: str, config, dtype: torch.dtype) -> None:
    """config.json and generation_config.json with upstream's fields and no others."""
    fields = config.to_dict()
    special = ("mask_token_id", "pad_token_id", "eos_token_id", "bos_token_id")
    own, fixed = SHAPE, DREAM_FIXED
    if family == "llada":
        theirs = {ours: name for name, ours in config.attribute_map.items()}
        own = [theirs.get(name, name) for name in SHAPE]
        fixed = LLADA_FIXED | {"embedding_size": config.vocab_size}
        special = special[:3]
    known = {name: fields[name] for name in (*own, *special)}
    kept = {**fixed, **known, "torch_dtype": str(dtype).removeprefix("torch.")}
    dump(folder / "config.json", dict(sorted(kept.items())))
    tokens = {name: fields[name] for name in special if fields.get(name) is not None}
    dump(folder / "generation_config.json", {"_from_model_config": True, **tokens})


def write_llada_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json; ids for a config.

    As upstream's, they do not say which token is the mask; config.json does.
    """
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    names = {n: tokenizer.special_tokens_map[n] for n in ("bos_token", "eos_token")}
    names["pad_token"] = tokenizer.pad_token
    ids = tokenizer.convert_tokens_to_ids(list(LLADA_SPECIAL))
    described = {
        "added_tokens_decoder": added_tokens(
            dict(zip(LLADA_SPECIAL, ids, strict=True))
        ),
        "chat_template": LLADA_CHAT,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    dump(folder / "tokenizer_config.json", {**described, **names})
    dump(folder / "special_tokens_map.json", names)
    return {
        "vocab_size": len(tokenizer),
        "mask_token_id": ids[2],
        "eos_token_id": ids[1],
        "pad_token_id": ids[1],
        "bos_token_id": ids[0],
    }


def write_dream_tokenizer(folder: Path, text: str) -> dict:
    """vocab.json, merges.txt and a tokenizer_config.json that names upstream's code."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = byte_pairs(text, split)
    models.BPE(vocabulary, merges).save(str(folder))
    ids = {name: len(vocabulary) + i for i, name in enumerate(DREAM_SPECIAL)}
    names = {
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
    }
    described = {
        "add_prefix_space": False,
        "added_tokens_decoder": added_tokens(ids),
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": DREAM_CHAT,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    dump(folder / "tokenizer_config.json", {**described, **names})
    dump(folder / "special_tokens_map.json", names)
    return {
        "vocab_size": len(vocabulary) + len(ids),
        "mask_token_id": ids["<|mask|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "bos_token_id": ids["<|beginoftext|>"],
    }


def added_tokens(ids: dict[str, int]) -> dict[str, dict]:
    """Special tokens as tokenizer_config.json lists them."""
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {str(i): {"content": c, **plain, "special": True} for c, i in ids.items()}


def dump(path: Path, fields: dict) -> None:
    """Write JSON as upstream's repositories have it."""
    path.write_text(json.dumps(fields, indent=2) + "\n")
