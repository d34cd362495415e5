"""Graph problems as tensors: what the path tasks draw, split and list."""

import string
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

LETTERS = string.ascii_lowercase + string.ascii_uppercase
NAMES = [*LETTERS, *(f"{letter}{k}" for k in range(1, 4) for letter in LETTERS)]
HELD_OUT = 16  # one problem in so many is for evaluation only


@dataclass
class Problems:
    """B problems of one size.

    Fields, with E edges, path length L and G targets:
        source, target: the edges, in the order in which they are listed.
        path: the nodes from s to the target that it reaches.
        goals: the targets, in the order in which they are listed.
    """

    source: Int[Tensor, "B E"]
    target: Int[Tensor, "B E"]
    path: Int[Tensor, "B L+1"]
    goals: Int[Tensor, "B G"]

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows) -> "Problems":
        return Problems(*(part[rows] for part in vars(self).values()))

    @property
    def depth(self) -> int:
        """Length L of the path in edges."""
        return self.path.shape[1] - 1


def held_out(problems: Problems) -> Bool[Tensor, " B"]:
    """Whether a problem is for evaluation, whatever the order of edges and goals.

    A hash of the set of edges, their directions left out, and of s. Problems that
    differ only in how they are listed are on the same side.
    """

    def mixed(x):  # multiply and shift, modulo 2^31
        x = (x + 1) * 0x9E3779B1 % 2**31
        return (x ^ (x >> 15)) * 0x85EBCA6B % 2**31

    low = problems.source.minimum(problems.target)
    high = problems.source.maximum(problems.target)
    edges = mixed(low * len(NAMES) + high).sum(1)
    code = mixed(edges % 2**31) + mixed(problems.path[:, 0] + 10_000)
    return (mixed(code % 2**31) >> 11) % HELD_OUT == 0


def shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    """[B, n, …] with the n entries of every row in an order of its own."""
    order = torch.rand(values.shape[:2], generator=generator).argsort(1)
    shape = (*order.shape, *[1] * (values.dim() - 2))
    return values.gather(1, order.view(shape).expand_as(values))


def frozen_path(name: str, depth: int) -> Path:
    """Where the evaluation set of a task and a depth lies."""
    return Path(__file__).parents[2] / "data" / "eval" / f"{name}_{depth}.jsonl"
