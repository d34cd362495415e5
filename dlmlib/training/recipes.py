"""Every shipped experiment by name, and `load`, which brings its trained model."""

import hashlib
import json
import os
import pkgutil
import shutil
from dataclasses import asdict, dataclass, field
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
from dlmlib.training.checkpoints import load_weights, read_info, save_weights
from dlmlib.training.fit import FitResult, fit


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of one experiment.

    name: what `load` is called with.
    description: one line for people; not part of the hash.
    task: "module:Class"; it has `tokenizer`, `length` and `sample(n, generator)`.
    task_arguments: of that class.
    model: fields of `DLMConfig`; vocabulary, special tokens and length are the task's.
    objective: arguments of `NELBO`, without the mask token; None for the
        `AutoregressiveNLL` of a causal model.
    batch_size: rows of fresh samples in a step.
    training: arguments of `fit`.
    seed: of the initial weights, the samples and the noise.

    Introduced in notebook 02.
    """

    name: str
    description: str
    task: str
    task_arguments: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] | None = field(default_factory=dict)
    batch_size: int = 64
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def hash(self) -> str:
        """sha256 of the recipe as canonical JSON; stored with the weights it makes."""
        facts = {k: v for k, v in asdict(self).items() if k != "description"}
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


PATHS = dict(  # of the graph tasks; the shift is Dream's: a node's own column looks up
    hidden_size=64,  # the node after it
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    rope_theta=1e5,
    initializer_range=0.1,
    shift_logits=True,
)

SUMS = dict(  # a low base: who stands next to whom is all that matters
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    rope_theta=100.0,
    initializer_range=0.1,
)


def sums(name: str, description: str, steps: int = 800, ar: bool = False, **task):
    """A recipe on running sums: masked diffusion, or its autoregressive twin."""
    twin = dict(attention="causal", shift_logits=True) if ar else {}
    return Recipe(
        name=name,
        description=description,
        task="dlmlib.tasks.sums:RunningSums",
        task_arguments=dict(terms=8, modulus=5, **task),
        model=SUMS | twin,
        objective=None if ar else dict(times="l_of_L"),
        training=dict(steps=steps, lr=4e-3, warmup=100),
    )


CHAINS = dict(  # of the arithmetic tasks
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=192,
    initializer_range=0.1,
)

REVEALED = dict(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    rope_theta=100.0,
    initializer_range=0.1,
)


def revealed(name: str, description: str, steps: int, data: str | None = None):
    """A recipe on problems told in parts; `data` makes it the autoregressive twin's."""
    twin = dict(attention="causal", shift_logits=True) if data else {}
    return Recipe(
        name=name,
        description=description,
        task=f"dlmlib.tasks.revealed:{'Chat' if data else 'Slots'}",
        task_arguments=dict(data=data) if data else {},
        model=REVEALED | twin,
        objective=None if data else dict(times="l_of_L"),
        batch_size=64,
        training=dict(steps=steps, lr=4e-3, warmup=100, ema=0.99),
    )


RECIPES = {
    recipe.name: recipe
    for recipe in [
        Recipe(
            name="grammar",
            description="masked diffusion on sentences of a small grammar",
            task="dlmlib.tasks.grammar:Grammar",
            model=dict(
                hidden_size=64,
                num_hidden_layers=3,
                intermediate_size=192,
                initializer_range=0.1,
            ),
            objective=dict(times="low_discrepancy"),
            batch_size=64,
            training=dict(steps=8000, lr=6e-3, warmup=100, ema=0.999),
        ),
        Recipe(
            name="chat",
            description="masked diffusion on a little chat, in LLaDA's format",
            task="dlmlib.tasks.chat:Chat",
            model=dict(
                hidden_size=64,
                num_hidden_layers=2,
                intermediate_size=192,
                initializer_range=0.1,
            ),
            objective=dict(times="l_of_L"),
            batch_size=64,
            training=dict(steps=2600, lr=5e-3, warmup=100, ema=0.99),
        ),
        Recipe(
            name="connectivity",
            description="masked diffusion on two-path graphs, with a scratchpad",
            task="dlmlib.tasks.connectivity:TwoPaths",
            model=PATHS,
            objective=dict(times="l_of_L"),
            batch_size=128,
            training=dict(steps=1500, lr=4e-3, warmup=100, ema=0.99),
        ),
        Recipe(
            name="connectivity_ar",
            description="the autoregressive twin of connectivity",
            task="dlmlib.tasks.connectivity:TwoPaths",
            model=PATHS | dict(attention="causal"),
            objective=None,
            batch_size=128,
            training=dict(steps=1000, lr=4e-3, warmup=100, ema=0.99),
        ),
        Recipe(
            name="star",
            description="masked diffusion on star graphs: the path to the goal",
            task="dlmlib.tasks.star:Star",
            model=PATHS,
            objective=dict(times="l_of_L"),
            batch_size=128,
            training=dict(steps=1500, lr=4e-3, warmup=100, ema=0.99),
        ),
        Recipe(
            name="star_ar",
            description="the autoregressive twin of star",
            task="dlmlib.tasks.star:Star",
            model=PATHS | dict(attention="causal"),
            objective=None,
            batch_size=128,
            training=dict(steps=1000, lr=4e-3, warmup=100, ema=0.99),
        ),
        Recipe(
            name="dead_ends",
            description="autoregressive walks and searches among dead ends",
            task="dlmlib.tasks.dead_ends:DeadEnds",
            model=PATHS | dict(num_hidden_layers=3, attention="causal"),
            objective=None,
            batch_size=128,
            training=dict(steps=2200, lr=4e-3, warmup=100, ema=0.99),
        ),
        Recipe(
            name="arithmetic",
            description="masked diffusion on chains of eight operations modulo 7",
            task="dlmlib.tasks.arithmetic:Arithmetic",
            model=CHAINS,
            objective=dict(times="l_of_L"),
            batch_size=64,
            training=dict(steps=1500, lr=4e-3, warmup=100),
        ),
        Recipe(
            name="arithmetic_sentence",
            description="the same chains, with an answer somewhere after them",
            task="dlmlib.tasks.arithmetic:Arithmetic",
            task_arguments=dict(form="sentence"),
            model=CHAINS,
            objective=dict(times="l_of_L"),
            batch_size=64,
            training=dict(steps=3000, lr=4e-3, warmup=100),
        ),
        sums("sums", "masked diffusion on running sums: one chain of 8"),
        sums("sums_shuffled", "the same sums, shuffled columns", steps=1600, stride=5),
        sums("sums_streams", "masked diffusion on 4 separate sums of 2", streams=4),
        sums("sums_separate", "masked diffusion on 8 separate terms", streams=8),
        sums("sums_ar", "the autoregressive twin of sums", ar=True),
        sums("sums_streams_ar", "the twin of sums_streams", ar=True, streams=4),
        revealed("revealed", "masked diffusion on problems told in parts", 1600),
        revealed("revealed_single", "its twin: all told at once", 400, "single"),
        revealed(
            "revealed_hindsight",
            "the twin on chats whose every answer is the last one",
            700,
            "hindsight",
        ),
        revealed(
            "revealed_honest",
            "the twin on chats whose answers say what was known",
            700,
            "honest",
        ),
    ]
}


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
    recipe = RECIPES[name]
    task, model = build(recipe)
    path = find_checkpoint(recipe)
    if path is not None:
        load_weights(path, model, recipe.hash)
        model.to(target)
    else:
        make(recipe, model.to(target), task, data_folders()[-1], progress)
    return model.eval(), task.tokenizer


def build(recipe: Recipe) -> tuple[Any, DiffusionLM]:
    """The task of a recipe and its model, with the recipe's initial weights."""
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
        return task, DiffusionLM(config)


def objective_of(recipe: Recipe, task: Any) -> NELBO | AutoregressiveNLL:
    """What a recipe trains on."""
    if recipe.objective is None:
        return AutoregressiveNLL()
    return NELBO(task.tokenizer.mask_token_id, **recipe.objective)


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
        fresh_batches(task, recipe.batch_size),
        objective_of(recipe, task),
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
