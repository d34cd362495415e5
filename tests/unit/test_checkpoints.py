"""Checkpoints: whole or not at all, and never silently the wrong one."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dlmlib.model import DiffusionLM, DLMConfig
from dlmlib.training import checkpoints
from dlmlib.training.checkpoints import (
    load_tensors,
    load_weights,
    read_info,
    save_tensors,
    save_weights,
)


def tiny_model(seed=0, **fields):
    fields = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, **fields}
    config = DLMConfig(num_attention_heads=2, intermediate_size=8, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DiffusionLM(config)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "it.safetensors"


def test_tensors_and_facts_come_back(path):
    shared = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tensors = {
        "float": shared,
        "tied": shared,
        "transposed": shared.T,
        "bf16": shared.bfloat16(),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, dtype=torch.long),
        "bytes": torch.arange(256).to(torch.uint8),
    }
    info = {"step": 3, "loss": 0.1 + 0.2, "nested": {"list": [1, None, "ü"]}}
    save_tensors(path, tensors, info)
    found, facts = load_tensors(path)
    assert_same(tensors, found)
    assert facts == info
    assert read_info(path).items() >= info.items()


def test_the_same_content_gives_the_same_bytes(path):
    info = {name: name for name in "abcdefgh"}
    tensors = {name: torch.ones(2) for name in "xyzuvw"}
    contents = set()
    for _ in range(5):
        save_tensors(path, tensors, info)
        contents.add(path.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(path, monkeypatch, where, error):
    save_tensors(path, {"x": torch.ones(3)}, {"version": 1})

    def fail(*_):
        raise error

    owner = checkpoints if where == "save_file" else os
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(type(error)):
        save_tensors(path, {"x": torch.zeros(3)}, {"version": 2})
    monkeypatch.undo()
    tensors, info = load_tensors(path)
    assert info == {"version": 1} and tensors["x"].tolist() == [1, 1, 1]
    assert os.listdir(path.parent) == [path.name]


HALF_A_SAVE = """
import runpy, time, torch
save = runpy.run_path({module!r})["save_tensors"]
save({path!r}, {{"x": torch.ones(1000)}}, {{"version": 1}})
whole = save.__globals__["save_file"]
def half(tensors, path, metadata):
    whole(tensors, path, metadata)
    content = open(path, "rb").read()
    open(path, "wb").write(content[: len(content) // 2])
    print("half written", flush=True)
    time.sleep(600)
save.__globals__["save_file"] = half
save({path!r}, {{"x": torch.zeros(1000)}}, {{"version": 2}})
"""


def test_a_process_killed_in_a_save_leaves_the_old_file(path):
    script = HALF_A_SAVE.format(module=checkpoints.__file__, path=str(path))
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half written\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir(path.parent)) == 2, "the kill did not come during the save"
    tensors, info = load_tensors(path)
    assert info == {"version": 1} and bool((tensors["x"] == 1).all())
    save_tensors(path, {"x": torch.zeros(1000)}, {"version": 3})
    assert load_tensors(path)[1] == {"version": 3}


def test_every_truncation_and_every_flipped_byte_is_noticed(path):
    save_tensors(path, {"x": torch.arange(4.0)}, {"step": 1})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=path.name):
            load_tensors(path)
    for index in range(len(content)):
        for bit in (1, 32, 128):
            path.write_bytes(
                content[:index] + bytes([content[index] ^ bit]) + content[index + 1 :]
            )
            with pytest.raises(ValueError, match=path.name):
                load_tensors(path)


def test_files_that_are_not_checkpoints_are_named_with_a_remedy(path):
    with pytest.raises(ValueError, match=r"it.safetensors.*expected.*make checkpoints"):
        load_tensors(path)
    path.parent.mkdir()
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"it.safetensors: \d+ bytes.*expected"):
        load_tensors(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"it.safetensors.*'dlmlib'.*dlm.load"):
        load_tensors(path)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_with_their_config_and_recipe(path, tied):
    saved, other = (tiny_model(s, tie_word_embeddings=tied) for s in (0, 1))
    save_weights(path, saved, "recipe", loss=0.5)
    info = load_weights(path, other, "recipe")
    assert_same(state(saved), state(other))
    tables = other.lm_head.weight, other.model.embed_tokens.weight
    assert (tables[0].data_ptr() == tables[1].data_ptr()) == tied
    assert info["loss"] == 0.5 and info["recipe"] == "recipe"
    rebuilt = DLMConfig(**info["config"])
    assert rebuilt.to_dict() == saved.config.to_dict()
    load_weights(path, DiffusionLM(rebuilt))


def test_a_model_without_a_config_can_be_saved(path):
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    save_weights(path, first)
    load_weights(path, second)
    assert_same(state(first), state(second))


def refused(path, model, *recipe):
    """The message of a load that must fail and leave the model as it was."""
    before = state(model)
    with pytest.raises(ValueError) as error:
        load_weights(path, model, *recipe)
    assert_same(before, state(model))
    assert path.name in str(error.value) and "expected" in str(error.value)
    return str(error.value)


def test_weights_of_another_recipe_are_refused(path):
    save_weights(path, tiny_model(), "a" * 64)
    message = refused(path, tiny_model(1), "b" * 64)
    assert "a" * 12 in message and "b" * 12 in message
    assert "make checkpoints" in message
    save_weights(path, tiny_model())
    assert "none" in refused(path, tiny_model(1), "b" * 64)


def test_weights_of_another_config_are_refused(path):
    save_weights(path, tiny_model(vocab_size=8))
    message = refused(path, tiny_model(vocab_size=9))
    assert "{'vocab_size': 8}" in message and "{'vocab_size': 9}" in message
    causal = refused(path, tiny_model(attention="causal"))  # the same shapes
    assert "'bidirectional'" in causal and "'causal'" in causal


def test_other_names_and_shapes_are_refused(path):
    save_weights(path, nn.Linear(2, 3))
    assert "weight has shape [3, 2], expected [3, 4]" in refused(path, nn.Linear(4, 3))
    message = refused(path, nn.Sequential(nn.Linear(2, 3)))
    assert "lacks tensors ['0.bias', '0.weight']" in message
    assert "unknown ones ['bias', 'weight']" in message
