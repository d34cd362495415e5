"""doctor.py: findings, remedies and exit codes."""

import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

from dlmlib import decoding, device, doctor, gauges
from dlmlib.training import recipes
from dlmlib.training.checkpoints import save_tensors


def probe(message, error=None):
    """A probe that reports `message`, or raises `error`."""

    def run():
        if error is not None:
            raise error
        return message

    return run


GOOD = doctor.Check("good", probe("fine"), "never shown")
BAD = doctor.Check("bad", probe("", RuntimeError("it broke")), "mend it")


def failing(name):
    """The check of that name must fail; returns its result."""
    result = next(check for check in doctor.CHECKS if check.name == name)()
    assert not result.ok
    assert result.remedy
    return result


def test_all_good_exits_with_zero(capsys):
    assert doctor.main([GOOD, GOOD]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["[OK]   good: fine"] * 2
    assert lines[2].startswith("all well (") and len(lines) == 3


def test_failure_shows_remedy_and_exits_with_one(capsys):
    assert doctor.main([BAD, GOOD, BAD]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "[FAIL] bad: it broke",
        "       -> mend it",
        "[OK]   good: fine",
    ]
    assert lines[-1].startswith("2 of 3 failed (")
    assert "never shown" not in "\n".join(lines)


def test_an_error_without_words_is_named():
    result = doctor.Check("bad", probe("", MemoryError()), "mend it")()
    assert (result.ok, result.detail, result.remedy) == (
        False,
        "MemoryError",
        "mend it",
    )


def test_every_check_has_a_name_and_a_remedy():
    names = [check.name for check in doctor.CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.remedy for check in doctor.CHECKS)


def test_this_environment_is_well(monkeypatch, capsys):
    monkeypatch.delenv("DLM_DEVICE", raising=False)
    monkeypatch.delenv("DLM_SCALE", raising=False)
    monkeypatch.setattr(recipes, "RECIPES", {})  # have tests of their own
    monkeypatch.delitem(sys.modules, "dlmlib.doctor")
    with pytest.raises(SystemExit) as exit_code:
        runpy.run_module("dlmlib.doctor", run_name="__main__")
    out = capsys.readouterr().out
    assert exit_code.value.code == 0, out
    assert out.count("[OK]") == len(doctor.CHECKS)


# ---- versions


def test_old_python(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    assert failing("python").detail == "3.9.1, needs >=3.11"


def test_new_python_is_accepted(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.14.0rc1")
    assert doctor.python().startswith("3.14.0rc1")


@pytest.mark.parametrize(
    ("name", "old"), [("torch", "2.1.0+cu118"), ("transformers", "4.46.2")]
)
def test_old_package(monkeypatch, name, old):
    monkeypatch.setattr(doctor, "version", lambda _: old)
    result = failing(name)
    assert result.detail.startswith(f"{old} is installed, needs >=")
    assert "make venv" in result.remedy


def test_nightly_package_is_accepted(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda _: "2.14.0.dev20261101+cu130")
    assert doctor.package("torch").startswith("2.14.0.dev")


def test_absent_package(monkeypatch):
    def absent(name):
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    assert "transformers" in failing("transformers").detail


def test_broken_package(monkeypatch):
    def broken(name):
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", broken)
    assert "libcudart.so" in failing("torch").detail


def test_jupyter_is_a_hint_not_a_failure(monkeypatch):
    assert doctor.jupyter() == "installed"

    def absent(name):
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    assert "jupyterlab" in doctor.jupyter() and "make venv" in doctor.jupyter()


# ---- the machine


def test_unknown_device_and_scale(monkeypatch):
    monkeypatch.setenv("DLM_DEVICE", "abacus")
    monkeypatch.setenv("DLM_SCALE", "huge")
    device_result, scale_result = failing("device"), failing("scale")
    assert "DLM_DEVICE='abacus'" in device_result.detail
    assert "DLM_DEVICE=cpu" in device_result.remedy
    assert "DLM_SCALE='huge'" in scale_result.detail
    assert "unset DLM_SCALE" in scale_result.remedy


def test_a_device_that_multiplies_wrongly(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a)
    assert failing("device").detail == "cpu multiplies wrongly"


def test_bfloat16_only_matters_when_it_is_chosen(monkeypatch):
    assert doctor.bfloat16() == "works; float32 is used"

    def refuse(left, right):
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)
    assert doctor.bfloat16() == "does not work; float32 is used"
    chosen = device.Choice(torch.device("cpu"), torch.bfloat16, "")
    monkeypatch.setattr(device, "pick_device", lambda: chosen)
    assert "does not work" in failing("bfloat16").detail


def test_little_room(monkeypatch):
    usage = SimpleNamespace(free=5 * 10**8)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(gauges, "host_memory", lambda: 10**9)
    assert failing("disk").detail == "0.5 GB free, needs 1 GB"
    assert failing("memory").detail == "1.0 GB free, needs 2 GB"


@pytest.mark.parametrize(
    ("value", "word"), [("1", "offline"), ("true", "offline"), ("0", "allowed")]
)
def test_offline_mode_is_reported(monkeypatch, value, word):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert word in doctor.network()


# ---- the library


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """Write a checkpoint of the only recipe, made by the recipe with that hash."""
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    recipe = recipes.RECIPES["grammar"]
    monkeypatch.setattr(recipes, "RECIPES", {"grammar": recipe})
    path = recipes.checkpoint_path(tmp_path, "grammar")

    def write(recipe_hash=recipe.hash):
        save_tensors(path, {"weight": torch.ones(300)}, {"recipe": recipe_hash})
        return path

    return write


def test_checkpoints_match_their_recipes(shipped):
    shipped()
    assert doctor.checkpoints() == "1 as their recipes made them"


def test_checkpoint_absent_or_of_another_recipe(shipped):
    for act in (lambda: None, lambda: shipped("another")):
        act()
        result = failing("checkpoints")
        assert result.detail == "none made by the recipe as it is now: grammar"
        assert "make checkpoints" in result.remedy


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_checkpoint(shipped, damage):
    path = shipped()
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(content[:-100] if damage == "cut" else flipped)
    assert str(path) in failing("checkpoints").detail


def test_smoke_test_notices_a_broken_decoder(monkeypatch):
    assert "8 tokens in 4 steps" in doctor.smoke_test()

    def unfinished(model, prompt, length, steps):
        masks = torch.ones(1, length, dtype=torch.long)
        return SimpleNamespace(sequences=torch.cat([prompt.cpu(), masks], dim=1))

    monkeypatch.setattr(decoding, "decode", unfinished)
    assert failing("smoke test").detail == "a mask was left"
    nothing = SimpleNamespace(sequences=torch.zeros(1, 2))
    monkeypatch.setattr(decoding, "decode", lambda *_, **__: nothing)
    assert failing("smoke test").detail == "decoded shape (1, 2), expected (1, 10)"
