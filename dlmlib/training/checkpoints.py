"""Weights and training states on disk: safetensors, written whole or not at all."""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]

KEY = "dlmlib"  # one metadata key: several would be written in a random order


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], info: dict) -> None:
    """Write tensors and facts about them to one safetensors file, atomically.

    The bytes go to a temporary file beside `path`, reach the disk, and only then take
    its name: whatever interrupts the save, `path` holds the old file or the new one.
    The same tensors and facts always give the same bytes.

    Args:
        path: the file; missing folders are made.
        tensors: name -> tensor, on any device.
        info: facts that JSON can hold. A digest of everything is added.

    Introduced in notebook 02.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Clones, since safetensors refuses tensors that share memory (tied weights).
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    info = {**info, "digest": _digest(tensors, info)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, {KEY: json.dumps(info, sort_keys=True)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | Path) -> tuple[Tensors, dict]:
    """Read what `save_tensors` wrote.

    Returns:
        The tensors, on the CPU, and the facts.
    Raises:
        ValueError: the file is missing, cut short, altered or not one of ours.

    Introduced in notebook 02.
    """
    info = read_info(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = info.pop("digest", None)
    found = _digest(tensors, info)
    if found != digest:
        raise ValueError(
            f"{path}: its content has digest {found[:12]}, expected "
            f"{str(digest)[:12]} as written; the file was altered: delete and remake it"
        )
    return tensors, info


def read_info(path: str | Path) -> dict:
    """The facts stored beside the tensors, without reading these.

    Raises:
        ValueError: the file is missing, cut short or not one of ours.

    Introduced in notebook 02.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file, expected a checkpoint; check the path, or make the "
            "shipped ones with `make checkpoints`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[KEY])
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: {size} bytes that cannot be read ({error}), expected a complete "
            "safetensors file; delete and remake it"
        ) from error
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: a safetensors file without {KEY!r} metadata, expected a "
            "checkpoint written by dlmlib; load other formats with dlm.load(folder)"
        ) from error


def save_weights(
    path: str | Path, model: nn.Module, recipe_hash: str = "", **facts: object
) -> None:
    """Write a model's weights, its config and the recipe that made it to one file.

    Args:
        path: where to; conventionally ends in .safetensors.
        model: its `config`, if it has one, is stored too.
        recipe_hash: see `Recipe.hash`.
        facts: whatever else to remember about the weights.

    Introduced in notebook 02.
    """
    info = {**facts, "config": config_of(model), "recipe": recipe_hash}
    save_tensors(path, model.state_dict(), info)


def load_weights(
    path: str | Path, model: nn.Module, recipe_hash: str | None = None
) -> dict:
    """Load weights into `model`, or raise and leave it as it was.

    Args:
        path: written by `save_weights`.
        model: of the shape that was saved.
        recipe_hash: the recipe the weights must come from; None accepts any.
    Returns:
        The facts stored with the weights.
    Raises:
        ValueError: the file is unreadable (see `load_tensors`), or was made by another
            recipe, for another config, or holds other names or shapes.

    Introduced in notebook 02.
    """
    tensors, info = load_tensors(path)
    recipe, stored, own = info.get("recipe"), info.get("config"), config_of(model)
    if recipe_hash is not None and recipe != recipe_hash:
        raise ValueError(
            f"{path}: made by recipe {str(recipe)[:12] or 'none'}, expected "
            f"{recipe_hash[:12]}; remake it with `make checkpoints`"
        )
    if stored and own and stored != own:
        fields = sorted(k for k in {*stored, *own} if stored.get(k) != own.get(k))
        found = {field: stored.get(field) for field in fields}
        wanted = {field: own.get(field) for field in fields}
        raise ValueError(
            f"{path}: made for config {found}, expected {wanted} as the model has; "
            "build the model with the config in the file (read_info(path)['config'])"
        )
    match_tensors(path, tensors, model.state_dict())
    model.load_state_dict(tensors)
    return info


def match_tensors(
    path: str | Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless both have the same names and shapes."""
    missing, extra = sorted({*expected} - {*found}), sorted({*found} - {*expected})
    if missing or extra:
        raise ValueError(
            f"{path}: lacks tensors {missing}, has unknown ones {extra}, expected the "
            f"{len(expected)} of the model; build the model that was saved"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {list(found[name].shape)}, expected "
                f"{list(tensor.shape)}; build the model that was saved"
            )


def config_of(model: nn.Module) -> dict:
    """The fields that the model's config class adds to transformers'; {} if none."""
    config = getattr(model, "config", None)
    fields = inspect.get_annotations(type(config)) if config is not None else ()
    return {field: getattr(config, field) for field in fields}


def _digest(tensors: Mapping[str, Tensor], info: dict) -> str:
    """sha256 of facts, names, dtypes, shapes and bytes: a flipped bit is noticed."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
