"""Paths, to be read forwards, and stars, to be read backwards, for one model."""

import torch
from torch import Tensor

from dlmlib.errors import check
from dlmlib.tasks.connectivity import TwoPaths
from dlmlib.tasks.star import Star


class BothWays:
    """Batches of `TwoPaths` with the whole chain, and of `Star`, in turn by a coin.

    Vocabulary and layout are shared; a row's kind is seen from its goals, two or one,
    and from the end of the path, written or given.

    Args:
        depth: largest L of both.
        nodes: labels to draw from, at least 2 (L + 1).
    Attributes:
        parts: the two tasks.
        tokenizer, length: their tokenizer, and T of the longest row.
    Raises:
        ValueError: a depth below 2, or too few nodes.
    Introduced in notebook 21.
    """

    def __init__(self, depth: int = 4, nodes: int = 18):
        check(depth >= 2, "depth", depth, "an integer >= 2")
        paths = TwoPaths((1, depth), nodes, truncated=0.0)
        self.parts = paths, Star((2, depth), nodes)
        self.tokenizer, self.length = paths.tokenizer, paths.length

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A training batch of one of the two tasks: n rows of one depth."""
        coin = int(torch.randint(2, (), generator=generator))
        return self.parts[coin].batch(n, generator)
