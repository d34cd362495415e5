"""The stand-in: upstream's layout, `dlm.load`'s whole path, and what loading costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig

import dlmlib as dlm
from dlmlib.memory import count_parameters
from dlmlib.model import Dream, LLaDA, stand_in, upstream

FAMILIES = {"llada": LLaDA, "dream": Dream}
TOKENIZER_FILES = {
    "llada": {"tokenizer.json"},
    "dream": {"vocab.json", "merges.txt"},
}
COMMON = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return stand_in.write(tmp_path_factory.mktemp(family), family)


def read(path) -> dict:
    return json.loads(path.read_text())


def tensors(folder) -> dict:
    """Every tensor of a sharded folder, by its stored name."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def test_the_layout_is_upstreams(folder, family):
    names = {file.name for file in folder.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names - shards == COMMON | TOKENIZER_FILES[family]
    assert len(shards) >= 3
    index = read(folder / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == shards
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 (not a dict)
    stored = tensors(folder)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    golden = f"{family}_a"
    assert set(stored) == set(load_file(GOLDENS / golden / "model.safetensors"))
    published = read(GOLDENS / golden / "config.json").keys()
    ours = read(folder / "config.json").keys()
    assert {n for n in published if not n.startswith("_")} ^ ours == {"auto_map"}


def test_load_walks_the_whole_path(folder, family):
    model, tokenizer = dlm.load(folder, device="cpu", progress=False)
    assert type(model) is FAMILIES[family]
    assert len(tokenizer) == model.config.vocab_size
    config, special = model.config, ("mask", "eos", "pad")
    for name in special:
        assert getattr(tokenizer, f"{name}_token_id") == getattr(
            config, f"{name}_token_id"
        )
    for text in (stand_in.TEXT, "Zwölf Boxkämpfer, 42 = 6 · 7\n\n🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(" masked diffusion model")) == 3  # a word, a token
    chat = [{"role": "user", "content": " two plus two "}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    begin = {"llada": "<|startoftext|>", "dream": "<|im_start|>"}[family]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == begin
    out = dlm.decode(model, ids, length=8, steps=4)
    assert not (out.sequences == tokenizer.mask_token_id).any()
    plain = AutoTokenizer.from_pretrained(folder) if family == "llada" else tokenizer
    assert plain("x y").input_ids == tokenizer("x y").input_ids


def test_given_weights_come_back_bit_for_bit(tmp_path, family):
    config = AutoConfig.from_pretrained(GOLDENS / f"{family}_a")
    given = AutoModel.from_pretrained(GOLDENS / f"{family}_a")
    folder = stand_in.write(tmp_path, family, model=given, shards=5)
    model, _ = dlm.load(folder, device="cpu", progress=False)
    weights = given.state_dict()
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())
    assert model.config.rope_theta == config.rope_theta
    published = load_file(GOLDENS / f"{family}_a" / "model.safetensors")
    stored = tensors(folder)
    assert stored.keys() == published.keys()
    assert all(torch.equal(stored[n], published[n]) for n in published)


def test_a_seed_is_a_model(tmp_path, family):
    same = [stand_in.write(tmp_path / str(i), family, seed=3) for i in range(2)]
    other = stand_in.write(tmp_path / "other", family, seed=4)
    first, second, third = (tensors(f) for f in (*same, other))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not all(torch.equal(first[n], third[n]) for n in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(family="bert"), "family='bert': expected 'llada' or 'dream'"),
        (dict(shards=0), "shards=0: expected an integer >= 1"),
        (dict(family="dream", tokenizer=1), "tokenizer='given': expected None"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        stand_in.write(tmp_path, **options)


# ---- options of loading


def test_a_device_map_gives_the_same_model(folder):
    plain, _ = dlm.load(folder, device="cpu", progress=False)
    mapped, _ = dlm.load(folder, device_map="auto", progress=False)
    weights = plain.state_dict()
    assert all(torch.equal(w.cpu(), weights[n]) for n, w in mapped.state_dict().items())


def test_layers_may_stay_on_the_disk(folder, tmp_path):
    """Offload: the forward is the same although half of the weights are not loaded."""
    plain, _ = dlm.load(folder, device="cpu", progress=False)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head")
    where = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    split, _ = dlm.load(
        folder, device_map=where, offload_folder=tmp_path, progress=False
    )
    kinds = {p.device.type for p in split.parameters()}
    assert kinds == {"cpu", "meta"}
    ids = torch.arange(6)[None]
    assert torch.equal(split(ids).logits, plain(ids).logits)


def test_quantization_is_passed_on(folder):
    """Without bitsandbytes the message says what to install."""
    if pytest.importorskip("transformers").utils.is_bitsandbytes_available():
        pytest.skip("bitsandbytes is here")
    with pytest.raises(ImportError, match=r"(?s)requires bitsandbytes.*pip install"):
        dlm.load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"dtype": "auto"}, 32),
        ({"dtype": "bfloat16"}, 16),
        ({"dtype": torch.float64}, 64),
        ({"dtype": "auto", "quantization_config": {"load_in_8bit": True}}, 8),
        (
            {
                "dtype": torch.bfloat16,
                "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
            },
            4,
        ),
    ],
)
def test_bits_of_a_weight(folder, options, bits):
    config = AutoConfig.from_pretrained(folder)
    assert upstream.bits_of(config, options) == bits


def test_too_large_is_refused_before_a_weight_is_read(folder, tmp_path, monkeypatch):
    """The weights are gone, and still the message is about memory."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    count = count_parameters(AutoConfig.from_pretrained(folder))
    monkeypatch.setattr("dlmlib.memory.free_memory", lambda device: 3 * count)
    with pytest.raises(MemoryError) as caught:
        dlm.load(bare, device="cpu", progress=False)
    assert "load_in_8bit=True): " in str(caught.value)
    fits = {
        line.split(":")[0].strip()
        for line in str(caught.value).splitlines()
        if "(fits)" in line
    }
    assert {"dtype=torch.bfloat16"} <= fits
    dlm.load(folder, device="cpu", dtype=torch.bfloat16, progress=False)


# ---- what loading costs

COST = """
import sys, threading, time
from pathlib import Path
import torch
from dlmlib.model.upstream import load_pretrained

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))

def load(folder, dtype):
    return load_pretrained(folder, torch.device("cpu"), False, dtype=dtype)[0]

small, folder = sys.argv[1:]
for dtype in (torch.float32, torch.bfloat16):
    load(small, dtype)  # imports and thread pools
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load(folder, torch.float32)
sum(p.sum() for p in model.parameters())  # bring in what is only mapped
print(sum(p.nbytes for p in model.parameters()), status("VmHWM") - before)

del model
before, most, done = status("RssAnon"), 0, threading.Event()
def watch():
    global most
    while not done.is_set():
        most = max(most, status("RssAnon"))
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = load(folder, torch.bfloat16)
done.set(), thread.join()
print(sum(p.nbytes for p in model.parameters()), most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_loading_takes_the_weights_and_less_than_a_shard_more(tmp_path):
    """Resident memory as stored; allocated memory where the dtype changes.

    In the second case the files are mapped while they are read, which the system can
    take back at any time.
    """
    large = dict(hidden_size=512, num_hidden_layers=6, intermediate_size=1024)
    folder = stand_in.write(tmp_path / "large", "llada", shards=8, **large)
    small = stand_in.write(tmp_path / "small", "llada")
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    run = subprocess.run(
        [sys.executable, "-c", COST, small, folder],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in run.stdout.splitlines():
        weights, peak = map(int, line.split())
        assert weights > 30e6
        assert 0.9 * weights < peak < weights + shard
