"""Training: the loop, its checkpoints, and every shipped experiment by name."""

from dlmlib.training.batches import batches_from, fresh_batches
from dlmlib.training.checkpoints import load_weights, read_info, save_weights
from dlmlib.training.fit import fit
from dlmlib.training.recipes import RECIPES, Recipe, load
from dlmlib.training.run import FitResult

__all__ = [
    "RECIPES",
    "FitResult",
    "Recipe",
    "batches_from",
    "fit",
    "fresh_batches",
    "load",
    "load_weights",
    "read_info",
    "save_weights",
]
