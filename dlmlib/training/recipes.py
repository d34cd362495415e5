"""`load`, which brings a recipe's trained model, and how recipes are carried out."""

import os
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dlmlib.device import generator, pick_device
from dlmlib.diffusion.objective import NELBO, AutoregressiveNLL
from dlmlib.errors import check
from dlmlib.model import DiffusionLM, DLMConfig
from dlmlib.model.upstream import load_pretrained
from dlmlib.training.batches import fresh_batches
from dlmlib.training.catalogue import RECIPES
from dlmlib.training.checkpoints import load_weights, read_info, save_weights
from dlmlib.training.fit import FitResult, fit
from dlmlib.training.recipe import Recipe


def load(
    name: str,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options,
) -> tuple[DiffusionLM, PreTrainedTokenizerBase]:
    """A trained model and its tokenizer.

    A recipe's checkpoint is used if there is one that this very recipe made; otherwise
    the model is trained, once, and kept in the user's cache folder.

    Args:
        name: a recipe (see `RECIPES`), or a folder or hub id of a model in our own,
            LLaDA's or Dream's format.
        device: where to; None to choose (see `pick_device`).
        progress: show a bar if it has to be trained.
        options: for a folder or hub id, what `load_pretrained` takes: dtype,
            device_map, quantization_config, ...
    Returns:
        The model, in evaluation mode, and the tokenizer.
    Raises:
        ValueError: the name is unknown, or its checkpoint cannot be read.

    Introduced in notebook 03.
    """
    target = pick_device(device).device
    if name not in RECIPES:
        known = "a folder or hub id of a saved model, or one of " + str(sorted(RECIPES))
        check("/" in str(name) or Path(name).is_dir(), "name", name, known)
        return load_pretrained(name, target, progress, **options)
    check(not options, "options", sorted(options), "none with a recipe")
    task, model = trained(RECIPES[name], target, progress)
    return model, task.tokenizer


def trained(recipe: Recipe, device=None, progress: bool = True) -> tuple[Any, Any]:
    """The task of a recipe and its trained model, from a checkpoint if there is one."""
    path = find_checkpoint(recipe)
    task, model = build(recipe, begin=path is None)
    if path is not None:
        load_weights(path, model, recipe.hash)
        model.to(device)
    else:
        make(recipe, model.to(device), task, data_folders()[-1], progress)
    return task, model.eval()


def build(recipe: Recipe, begin: bool = True) -> tuple[Any, DiffusionLM]:
    """The task of a recipe and its model, with the recipe's initial weights.

    `begin=False` leaves out the trained weights of `recipe.start`.
    """
    task = pkgutil.resolve_name(recipe.task)(**recipe.task_arguments)
    tokenizer = task.tokenizer
    config = DLMConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=task.length,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **recipe.model,
    )
    with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
        torch.manual_seed(recipe.seed)
        model = DiffusionLM(config)
        for name, head in recipe.heads.items():
            model.add_module(name, pkgutil.resolve_name(head)(config))
    if begin and recipe.start is not None:
        weights = trained(recipe.start, progress=False)[1].state_dict()
        model.load_state_dict(model.state_dict() | weights)
    return task, model


def objective_of(recipe: Recipe, task: Any) -> NELBO | AutoregressiveNLL:
    """What a recipe trains on."""
    if recipe.objective is None:
        return AutoregressiveNLL()
    return NELBO(task.tokenizer.mask_token_id, **recipe.objective)


def taught_by(recipe: Recipe, model, task) -> tuple[Any, Any]:
    """(batches, objective): what a recipe hands to `fit`."""
    if recipe.trainer is None:
        batches = fresh_batches(task, recipe.batch_size)
        return batches, objective_of(recipe, task)
    trainer = pkgutil.resolve_name(recipe.trainer)
    return trainer(model, task, **recipe.trainer_arguments)


def make(
    recipe: Recipe, model: DiffusionLM, task: Any, folder: Path, progress: bool = True
) -> FitResult:
    """Train `model` (from `build`) by the recipe and save it under `folder`.

    The training state is saved on the way: interrupted, the same call goes on with it.
    """
    path = checkpoint_path(folder, recipe.name)
    unfinished = folder / "unfinished" / f"{recipe.name}-{recipe.hash[:12]}"
    result = fit(
        model,
        *taught_by(recipe, model, task),
        seed=recipe.seed,
        checkpoint=unfinished,
        progress=progress,
        **recipe.training,
    )
    save_weights(path, model, recipe.hash, loss=fresh_loss(recipe, task, model))
    shutil.rmtree(unfinished, ignore_errors=True)
    return result


@torch.no_grad()
def fresh_loss(recipe: Recipe, task: Any, model: DiffusionLM) -> float:
    """Nats per token of the recipe's objective on the same fresh rows every time.

    Stored with the weights: if the task's code changes under them, the number does.
    """
    draws, objective = generator(12345), objective_of(recipe, task)
    noised = objective.corrupt(task.batch(1024, draws), draws)
    device = next(model.parameters()).device
    noised = {name: tensor.to(device) for name, tensor in noised.items()}
    return (objective(model.eval(), noised).sum() / noised["tokens"].sum()).item()


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The first checkpoint, shipped or cached, that this very recipe made."""
    for folder in data_folders():
        path = checkpoint_path(folder, recipe.name)
        if path.is_file() and read_info(path).get("recipe") == recipe.hash:
            return path
    return None


def checkpoint_path(folder: Path, name: str) -> Path:
    """Where a data folder keeps the weights of a recipe."""
    return folder / "checkpoints" / f"{name}.safetensors"


def data_folders() -> list[Path]:
    """Where checkpoints are looked for, in order; `load` writes new ones to the last.

    $DLM_DATA if set; else the repository's data folder, when the package lies in a
    repository, and ~/.cache/dlmlib.
    """
    if os.environ.get("DLM_DATA"):
        return [Path(os.environ["DLM_DATA"])]
    root = Path(__file__).parents[2]
    in_repository = (root / "pyproject.toml").is_file() and (root / "data").is_dir()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [root / "data"] * in_repository + [cache / "dlmlib"]
