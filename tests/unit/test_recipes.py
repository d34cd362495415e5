"""Recipes: a hash for every experiment, checkpoints that match it, and `load`."""

import json
import runpy
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dlmlib.device import generator
from dlmlib.model import DiffusionLM, DLMConfig
from dlmlib.text import word_tokenizer
from dlmlib.training import recipes, shipping
from dlmlib.training.checkpoints import load_weights, read_info, save_weights
from dlmlib.training.recipes import RECIPES, Recipe, build, checkpoint_path, load

DATA = Path(__file__).parents[2] / "data"
SHIPPED = shipping.shipped(DATA)


class Twins:
    """Sentences of one word said twice."""

    length = 2

    def __init__(self, words="abc"):
        self.tokenizer = word_tokenizer(list(words))

    def batch(self, n, generator):
        word = torch.randint(4, 7, (n, 1), generator=generator)
        return {"input_ids": word.repeat(1, 2)}


TINY = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
)


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """A recipe of three steps named "twins", and an empty data folder."""
    module = ModuleType("twins_task")
    module.Twins = Twins
    monkeypatch.setitem(sys.modules, "twins_task", module)
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    monkeypatch.setenv("DLM_DEVICE", "cpu")
    twins = Recipe(
        name="twins",
        description="one word twice",
        task="twins_task:Twins",
        model=TINY,
        batch_size=4,
        training=dict(steps=3, lr=1e-2, save_every=1),
    )
    for name in list(RECIPES):
        monkeypatch.delitem(RECIPES, name)
    monkeypatch.setitem(RECIPES, "twins", twins)
    return twins


def assert_same(first, second):
    for (name, one), two in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name


def no_training(*_, **__):
    raise AssertionError("a checkpoint was there, yet the model was trained")


def test_the_hash_is_that_of_the_recipe_and_nothing_else(recipe):
    assert replace(recipe, description="other words").hash == recipe.hash
    changes = dict(
        name="other",
        task="x:Y",
        task_arguments={"words": "abcd"},
        model=TINY | {"hidden_size": 16},
        objective={"times": "iid"},
        batch_size=5,
        training={"steps": 4},
        seed=1,
        start=recipe,
        heads={"extra": "torch.nn:Identity"},
        trainer="module:function",
        trainer_arguments={"method": "trajectory"},
    )
    decisive = {field.name for field in fields(Recipe)} - {"description"}
    assert changes.keys() == decisive
    hashes = {replace(recipe, **{k: v}).hash for k, v in changes.items()}
    assert len(hashes | {recipe.hash}) == len(changes) + 1
    turned = replace(recipe, model=dict(reversed(TINY.items())))
    assert turned.hash == recipe.hash
    # Pinned: another way of writing the JSON would orphan every checkpoint.
    assert Recipe("name", "about", "module:Class").hash.startswith("1ab547b4a5c39590")


def test_load_trains_once_and_then_reads(recipe, tmp_path, monkeypatch, capsys):
    first, tokenizer = load("twins", progress=False)
    path = checkpoint_path(tmp_path, "twins")
    assert capsys.readouterr() == ("", "")
    assert read_info(path)["recipe"] == recipe.hash
    assert read_info(path)["config"]["vocab_size"] == len(tokenizer) == 7
    assert list(tmp_path.rglob("*.safetensors")) == [path]
    monkeypatch.setattr(recipes, "fit", no_training)
    second, _ = load("twins", progress=False)
    assert_same(first, second)
    assert not first.training and not second.training
    assert first.config.mask_token_id == tokenizer.mask_token_id


def test_a_checkpoint_of_an_older_recipe_is_not_used(recipe, tmp_path, monkeypatch):
    load("twins", progress=False)
    newer = replace(recipe, seed=1)
    monkeypatch.setitem(RECIPES, "twins", newer)
    load("twins", progress=False)
    assert read_info(checkpoint_path(tmp_path, "twins"))["recipe"] == newer.hash


def test_a_shipped_checkpoint_comes_before_the_cache(recipe, tmp_path, monkeypatch):
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    monkeypatch.setattr(recipes, "data_folders", lambda: [shipped, cache])
    load("twins", progress=False)
    assert not shipped.exists() and checkpoint_path(cache, "twins").is_file()
    _, model = build(recipe)
    save_weights(checkpoint_path(shipped, "twins"), model, recipe.hash)
    assert_same(load("twins")[0], model)
    save_weights(checkpoint_path(shipped, "twins"), model, "of an older recipe")
    monkeypatch.setattr(recipes, "fit", no_training)
    trained, _ = load("twins")
    assert not torch.equal(trained.lm_head.weight, model.lm_head.weight)


def test_interrupted_training_goes_on_where_it_was(recipe, tmp_path, monkeypatch):
    expected, _ = load("twins", progress=False)
    checkpoint_path(tmp_path, "twins").unlink()
    batch, calls = Twins.batch, []

    def failing(self, n, generator):
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch(self, n, generator)

    monkeypatch.setattr(Twins, "batch", failing)
    with pytest.raises(KeyboardInterrupt):
        load("twins", progress=False)
    assert not checkpoint_path(tmp_path, "twins").exists()
    resumed, _ = load("twins", progress=False)
    drawn = [n for n in calls if n < 100]  # the last draw, of many rows, is graded
    assert len(drawn) == 4, "two steps were kept, the third was drawn twice"
    assert_same(expected, resumed)


def test_a_damaged_checkpoint_is_named(recipe, tmp_path):
    load("twins", progress=False)
    path = checkpoint_path(tmp_path, "twins")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"twins.safetensors.*expected"):
        load("twins", progress=False)


def test_initial_weights_come_from_the_recipe_alone(recipe):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(recipe)[1]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert_same(first, build(recipe)[1])
    other = build(replace(recipe, seed=1))[1]
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_recipe_that_starts_from_another(recipe, tmp_path, monkeypatch):
    """Its first weights are the other's last ones, and a head is trained along."""

    def trainer(model, task, share):
        def batches(generator):
            return task.batch(int(8 * share), generator)

        class Sum:
            def corrupt(self, batch, generator):
                rows = len(batch["input_ids"])
                assert rows == 4
                return {**batch, "tokens": torch.ones(rows, dtype=torch.long)}

            def __call__(self, model, batch):
                logits = model(batch["input_ids"]).logits
                return (logits.sum((1, 2)) + 1) * model.extra.weight.sum()

        return batches, Sum()

    monkeypatch.setattr(sys.modules["twins_task"], "trainer", trainer, raising=False)
    second = replace(
        recipe,
        name="second",
        start=recipe,
        heads={"extra": "torch.nn:Linear"},
        trainer="twins_task:trainer",
        trainer_arguments={"share": 0.5},
    )
    head = lambda config: torch.nn.Linear(2, 1)  # noqa: E731
    monkeypatch.setattr(sys.modules["twins_task"], "Head", head, raising=False)
    second = replace(second, heads={"extra": "twins_task:Head"})
    monkeypatch.setitem(RECIPES, "second", second)
    start, _ = load("twins", progress=False)
    _, begun = build(second)
    assert torch.equal(begun.lm_head.weight, start.lm_head.weight)
    first_head = begun.extra.weight.clone()
    assert torch.equal(first_head, build(second)[1].extra.weight), "drawn by its seed"
    model, _ = load("second", progress=False)
    assert not torch.equal(model.extra.weight, first_head)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    monkeypatch.setattr(recipes, "fit", no_training)
    assert_same(model, load("second", progress=False)[0])
    # Another start makes another recipe, whatever it is called.
    other = replace(second, start=replace(recipe, seed=1))
    assert other.hash != second.hash
    assert replace(second, start=replace(recipe, description="x")).hash == second.hash


def test_an_unknown_name_lists_the_known(recipe):
    with pytest.raises(ValueError, match=r"name='nobody': .*folder or hub id.*twins"):
        load("nobody")


def test_a_folder_of_our_own_format(tmp_path):
    tokenizer = word_tokenizer(["to", "be"])
    saved = DiffusionLM(DLMConfig(vocab_size=len(tokenizer), **TINY))
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, read = load(str(tmp_path))
    assert_same(saved, model)
    assert not model.training
    assert read.encode("to be [MASK]") == tokenizer.encode("to be [MASK]")


def test_a_folder_of_another_format_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"model_type of .*='bert': expected one of"):
        load(str(tmp_path))


def test_data_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    assert recipes.data_folders() == [tmp_path]
    monkeypatch.delenv("DLM_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recipes.data_folders() == [DATA, tmp_path / "dlmlib"]
    installed = tmp_path / "lib" / "dlmlib" / "training" / "recipes.py"
    monkeypatch.setattr(recipes, "__file__", str(installed))
    assert recipes.data_folders() == [tmp_path / "dlmlib"]


def test_remaking_lists_what_it_made(recipe, tmp_path, capsys):
    readme = tmp_path / "README.md"
    shipping.main([])
    out = capsys.readouterr().out
    path = checkpoint_path(tmp_path, "twins")
    digest, size = shipping.sha256(path), path.stat().st_size
    assert digest in out and f"{size:,} bytes" in out
    line = f"| twins.safetensors | one word twice | {size:,} | `{digest}` |"
    assert line in readme.read_text() and "shipping twins`" in readme.read_text()
    readme.write_text("intro\n" + readme.read_text().replace(digest, "old") + "more\n")
    shipping.main(["twins"])  # the same bytes again
    text = readme.read_text()
    assert line in text and text.startswith("intro\n") and text.endswith("more\n")
    assert text.count("twins.safetensors") == 1
    assert shipping.complaints(tmp_path) == []


def test_stale_checkpoints_are_found(recipe, tmp_path, monkeypatch):
    shipping.main(["twins"])
    readme = tmp_path / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace("one word twice", "something else"))
    assert "not as listed" in shipping.complaints(tmp_path)[0]
    readme.unlink()
    assert "not as listed" in shipping.complaints(tmp_path)[0]
    readme.write_text(text)
    monkeypatch.setitem(RECIPES, "twins", replace(recipe, batch_size=3))
    assert "not made by the recipe" in shipping.complaints(tmp_path)[0]
    monkeypatch.delitem(RECIPES, "twins")
    assert "no recipe" in shipping.complaints(tmp_path)[0]


def test_the_command_names_the_known_recipes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes", "nobody"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(shipping.__file__, run_name="__main__")
    assert "'nobody': expected one of" in capsys.readouterr().err


def test_shipped_checkpoints_match_recipes_and_list():
    assert shipping.complaints(DATA) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_checkpoints_still_fit_their_task(path):
    """The recipe's hash does not see a change in the task's code; the loss does."""
    recipe = RECIPES[path.stem]
    task, model = build(recipe)
    info = load_weights(path, model, recipe.hash)
    loss = recipes.fresh_loss(recipe, task, model)
    assert loss == pytest.approx(info["loss"], rel=1e-3, abs=1e-5)


def test_the_recipes_can_be_built():
    for name, recipe in RECIPES.items():
        assert name == recipe.name and recipe.description
        task, model = build(recipe)
        ids = task.batch(2, generator(0))["input_ids"]
        rows, width = ids.shape
        assert rows == 2 and width <= task.length
        logits = model(ids).logits
        assert logits.shape == (2, width, len(task.tokenizer))
        assert 5e4 < model.num_parameters() < 1e6
