"""Official checkpoint folders: read as published, written back bit for bit."""

import json
import shutil

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

import dlmlib as dlm
from dlmlib.model import Dream, LLaDA

FAMILIES = {"llada_a": LLaDA, "dream_a": Dream}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, tmp_path):
    """A copy of an official checkpoint that a test may damage."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / family / name, tmp_path / name)
    return tmp_path


def fields(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, **changes):
    (folder / "config.json").write_text(json.dumps(fields(folder) | changes))


def shard(folder):
    """Split the weights in two files with an index, as large models are published."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index, names = {}, sorted(weights)
    for number in (0, 1):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        part = {name: weights[name] for name in names[number::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(weight.nbytes for weight in weights.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def test_auto_classes_know_the_family(family):
    assert type(AutoConfig.from_pretrained(GOLDENS / family)).__name__ == (
        FAMILIES[family].config_class.__name__
    )
    assert type(AutoModel.from_pretrained(GOLDENS / family)) is FAMILIES[family]


def test_round_trip_is_bit_for_bit(family, tmp_path):
    model = AutoModel.from_pretrained(GOLDENS / family)
    model.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(GOLDENS / family / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    written, published = fields(tmp_path), fields(GOLDENS / family)
    ignored = {"architectures", "torch_dtype", "use_cache", "rope_scaling"}
    for name in published.keys() - ignored:
        assert written[name] == published[name], name
    again = AutoModel.from_pretrained(tmp_path)
    weights = model.state_dict()
    assert all(torch.equal(w, weights[n]) for n, w in again.state_dict().items())


def test_shards_are_one_checkpoint(folder, family):
    shard(folder)
    model = AutoModel.from_pretrained(folder)
    whole = AutoModel.from_pretrained(GOLDENS / family).state_dict()
    assert all(torch.equal(w, whole[n]) for n, w in model.state_dict().items())


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="model-00002-of-00002"):
        AutoModel.from_pretrained(folder)


def test_a_truncated_file_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="unreadable safetensors"):
        AutoModel.from_pretrained(folder)


def test_a_wrong_shape_is_named(folder):
    wide = {"mlp_hidden_size": 192} if "d_model" in fields(folder) else None
    rewrite(folder, **(wide or {"intermediate_size": 192}))
    with pytest.raises(ValueError, match=r"mismatched_keys.*gate_proj"):
        AutoModel.from_pretrained(folder)


def test_a_missing_layer_is_named(folder):
    deep = "n_layers" if "n_layers" in fields(folder) else "num_hidden_layers"
    rewrite(folder, **{deep: 3})
    with pytest.raises(ValueError, match=r"missing_keys.*layers\.2"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llada_a", "alibi", True),
        ("llada_a", "layer_norm_type", "default"),
        ("llada_a", "block_type", "sequential"),
        ("llada_a", "include_bias", True),
        ("dream_a", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("dream_a", "use_sliding_window", True),
    ],
    indirect=["family"],
)
def test_another_network_is_refused_by_name(folder, name, value):
    rewrite(folder, **{name: value})
    with pytest.raises(ValueError, match=f"config {name}="):
        AutoConfig.from_pretrained(folder)


def test_output_rows_may_exceed_the_vocabulary(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / "llada_a" / name, tmp_path / name)
    rewrite(tmp_path, vocab_size=490)
    assert AutoModel.from_pretrained(tmp_path).config.vocab_size == 512


# ---- dlm.load: model and tokenizer of a folder as it is published

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "2 + 2 = 4, naïvely.\n  Two spaces."


def byte_level() -> Tokenizer:
    """A small byte-level BPE, the kind that both families use."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def add_llada_tokenizer(folder):
    """tokenizer.json and its config, whose class is transformers' own."""
    special = {"mask_token": "<|mdm_mask|>", "eos_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **special)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def add_dream_tokenizer(folder):
    """vocab.json, merges.txt, and a config that names code we do not run."""
    bpe = byte_level()
    bpe.model.save(str(folder))
    names = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|beginoftext|>",
        "<|mask|>",
    )
    added = {
        str(bpe.get_vocab_size() + i): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, name in enumerate(names)
    }
    config = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer",
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


TOKENIZERS = {"llada_a": add_llada_tokenizer, "dream_a": add_dream_tokenizer}


def test_load_brings_model_and_tokenizer(folder, family):
    TOKENIZERS[family](folder)
    code = {"AutoModel": "modeling_other.OtherModel"}  # as published; must not be run
    rewrite(folder, auto_map=code)
    model, tokenizer = dlm.load(folder, device="cpu")
    assert type(model) is FAMILIES[family] and not model.training
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.mask_token_id is not None and tokenizer.mask_token_id not in ids
    chat = [{"role": "user", "content": "2 + 2"}]
    said = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    assert said == "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(said, return_tensors="pt").input_ids
    out = dlm.decode(model, prompt, length=8, block_length=4, steps=4)
    assert not (out.sequences == model.config.mask_token_id).any()


def test_load_passes_options_through(folder, family):
    TOKENIZERS[family](folder)
    model, _ = dlm.load(folder, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"options=\['dtype'\]: expected none"):
        dlm.load("grammar", dtype=torch.bfloat16)


def test_a_repository_that_cannot_be_reached_says_so():
    with pytest.raises(
        OSError, match=r"(?s)GSAI-ML/LLaDA-8B-Instruct: .*HF_HUB_OFFLINE"
    ):
        dlm.load("GSAI-ML/LLaDA-8B-Instruct")
