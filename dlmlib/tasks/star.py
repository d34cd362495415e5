"""Star graphs: two arms leave s, and only the goal tells which one to take."""

import torch
from jaxtyping import Bool
from torch import Tensor

from dlmlib.errors import check
from dlmlib.tasks.connectivity import FROZEN_DEPTHS, TwoPaths
from dlmlib.tasks.graph_problems import Problems, shuffled


class Star(TwoPaths):
    """Two arms of L edges leave s; write the path to the goal at the end of one.

    A row is `a>f a>c f>d c>m  d  a f d`: edges, goal, s and the path, whose last node,
    the goal, is given. Forwards, the first node is a guess between the arms that only
    the far end decides; backwards, from the goal, every node is looked up.

    Args:
        depths: smallest and largest L, at least 2.
        nodes: labels to draw from, at least 2 L + 1.

    Source: Bachmann and Nagarajan (arXiv 2403.06963), the path-star task. Introduced in
    notebook 14.
    """

    name, num_goals = "star", 1

    def __init__(self, depths: tuple[int, int] = (2, 8), nodes: int = 18):
        check(depths[0] >= 2, "depths", depths, "2 <= smallest <= largest")
        super().__init__(depths, nodes, truncated=0.0)

    def nodes_needed(self, depth: int) -> int:
        return 2 * depth + 1

    def row_length(self, depth: int) -> int:
        return 1 + self.edges_in(depth) + 1 + depth + 1

    def _draw(self, n: int, depth: int, generator: torch.Generator) -> Problems:
        labels = self.labels(n, depth, generator)
        arms = labels[:, 1:].view(n, 2, depth)
        root = labels[:, :1, None].expand(n, 2, 1)
        paths = torch.cat([root, arms], 2)
        edges = torch.stack([paths[..., :-1], paths[..., 1:]], -1).flatten(1, 2)
        edges = shuffled(edges, generator)
        return Problems(
            edges[..., 0], edges[..., 1], paths[:, 0].clone(), paths[:, 0, -1:].clone()
        )

    def render(self, problems: Problems, budget: None = None) -> Tensor:
        """Solved rows of token ids [B, T]."""
        return torch.cat([self.head(problems), self.first + problems.path], 1)

    def written(self, problems: Problems, budget: None = None) -> Tensor:
        """[B, T], True between s and the goal."""
        begin = 1 + problems.source.shape[1] + 1 + 1
        columns = torch.arange(begin + problems.depth)
        written = (columns >= begin) & (columns < len(columns) - 1)
        return written.expand(len(problems), -1)

    def grade(self, problems: Problems, ids: Tensor) -> Bool[Tensor, " B"]:
        """Whether the whole path is right."""
        said = ids[:, -problems.depth - 1 :].cpu() - self.first
        return (said == problems.path).all(1)

    def evidence(self, problems: Problems, ids: Tensor) -> Bool[Tensor, " B"]:
        """The same as `grade`: the path is the answer."""
        return self.grade(problems, ids)


if __name__ == "__main__":
    for length in FROZEN_DEPTHS:
        Star().write_frozen(length)
