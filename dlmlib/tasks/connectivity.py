"""Which of two targets does s reach? Paths that have to be walked edge by edge.

A row is [BOS], the edges in random order, the targets, s, a scratchpad, `=` and the
answer: `a>f k>c f>d c>m  m d  a f d = d`. An edge is one token. To write the node after
f, find the edge whose source is f and copy its target: one look-up, one edge.
"""

import json

import networkx as nx
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.errors import check
from dlmlib.tasks.graph_problems import NAMES, Problems, frozen_path, held_out, shuffled
from dlmlib.text import word_tokenizer

EQUALS, UNKNOWN = "=", "?"
FROZEN_SEED, FROZEN_ROWS, FROZEN_DEPTHS = 20261121, 256, range(2, 9)


class TwoPaths:
    """Two disjoint directed paths of L edges; s starts one; which target does it reach?

    The scratchpad holds the first b nodes after s. b = L is the whole chain of
    thought, b = 0 the answer at once, anything between a truncated chain. A training
    batch has one L, drawn with weight 1/L from `depths` so that most rows are short,
    and one b: L, or with chance `truncated` any of 0 … L.

    Args:
        depths: smallest and largest L.
        nodes: labels to draw from, at least 2 (L + 1).
        truncated: see above.

    Attributes:
        tokenizer, length: its tokenizer, and T of the longest row.

    Raises:
        ValueError: depths that are not 1 <= smallest <= largest, too few or too many
            nodes, or a chance outside [0, 1].

    Source: Mirtaheri et al. (arXiv 2505.21825), the two-path graph. Introduced in
    notebook 14.
    """

    name, num_goals = "connectivity", 2

    def __init__(
        self,
        depths: tuple[int, int] = (1, 8),
        nodes: int = 18,
        truncated: float = 0.3,
    ):
        low, high = depths
        check(1 <= low <= high, "depths", depths, "1 <= smallest <= largest")
        least = self.nodes_needed(high)
        fits = least <= nodes <= len(NAMES)
        check(fits, "nodes", nodes, f"within [{least}, {len(NAMES)}]")
        check(0 <= truncated <= 1, "truncated", truncated, "a chance within [0, 1]")
        self.depths, self.nodes, self.truncated = (low, high), nodes, truncated
        names = NAMES[:nodes]
        edges = [f"{a}>{b}" for a in names for b in names]
        self.tokenizer = word_tokenizer([EQUALS, UNKNOWN, *names, *edges])
        self.equals, self.unknown, self.first = range(4, 7)  # after four specials
        self.length = self.row_length(high)

    def nodes_needed(self, depth: int) -> int:
        """Nodes of a problem."""
        return 2 * (depth + 1)

    def row_length(self, depth: int) -> int:
        """T of a row with the whole chain."""
        return 1 + self.edges_in(depth) + self.num_goals + (depth + 1) + 2

    # -- problems

    def sample(
        self,
        n: int,
        generator: torch.Generator,
        depth: int | None = None,
        evaluation: bool = False,
    ) -> Problems:
        """Draw n problems of one depth, from the training or the evaluation side.

        Args:
            n: how many, at least 1.
            generator: a CPU generator.
            depth: L; None draws it, the same for all n.
            evaluation: problems that training never sees, see `held_out`.

        Raises:
            ValueError: n < 1 or a depth that the labels do not suffice for.
        """
        check(n >= 1, "n", n, "an integer >= 1")
        depth = self.draw_depth(generator) if depth is None else depth
        possible = depth >= 1 and self.nodes_needed(depth) <= self.nodes
        check(possible, "depth", depth, f"1 or more, within {self.nodes} nodes")
        problems = self._draw(n, depth, generator)
        while (wrong := held_out(problems) != evaluation).any():
            fresh = self._draw(int(wrong.sum()), depth, generator)
            for old, new in zip(
                vars(problems).values(), vars(fresh).values(), strict=True
            ):
                old[wrong] = new
        return problems

    def draw_depth(self, generator: torch.Generator) -> int:
        """L with weight 1/L."""
        low, high = self.depths
        weights = 1 / torch.arange(low, high + 1)
        return low + int(torch.multinomial(weights, 1, generator=generator))

    def labels(self, n: int, depth: int, generator) -> Int[Tensor, "n M"]:
        """Fresh labels for the nodes of n problems."""
        order = torch.rand(n, self.nodes, generator=generator).argsort(1)
        return order[:, : self.nodes_needed(depth)]

    def _draw(self, n: int, depth: int, generator: torch.Generator) -> Problems:
        paths = self.labels(n, depth, generator).view(n, 2, depth + 1)
        edges = torch.stack([paths[..., :-1], paths[..., 1:]], -1).flatten(1, 2)
        edges = shuffled(edges, generator)
        goals = shuffled(paths[..., -1], generator)
        return Problems(edges[..., 0], edges[..., 1], paths[:, 0].clone(), goals)

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A training batch of n fresh solved problems, all of one depth and budget.

        Returns:
            input_ids [n, T], and maskable [n, T]: scratchpad and answer.
        """
        problems, budget = self.sample(n, generator), None
        if float(torch.rand((), generator=generator)) < self.truncated:
            most = problems.depth + 1
            budget = int(torch.randint(most, (), generator=generator))
        ids, written = self.render(problems, budget), self.written(problems, budget)
        return {"input_ids": ids, "maskable": written}

    # -- rows

    def render(self, problems: Problems, budget: int | None = None) -> Tensor:
        """Solved rows of token ids [B, T] with `budget` nodes of scratchpad.

        Args:
            problems: of one depth L.
            budget: b; default L.

        Raises:
            ValueError: a budget outside 0 … L.
        """
        budget = self._budget(problems, budget)
        parts = [
            self.head(problems),
            self.first + problems.path[:, : 1 + budget],
            torch.full_like(problems.path[:, :1], self.equals),
            self.first + problems.path[:, -1:],
        ]
        return torch.cat(parts, 1)

    def head(self, problems: Problems) -> Int[Tensor, "B P"]:
        """[BOS], edges and targets."""
        edges = problems.source * self.nodes + problems.target
        edges = edges + self.first + self.nodes
        bos = torch.full_like(edges[:, :1], self.tokenizer.bos_token_id)
        return torch.cat([bos, edges, self.first + problems.goals], 1)

    def _budget(self, problems: Problems, budget: int | None) -> int:
        budget = problems.depth if budget is None else budget
        inside = 0 <= budget <= problems.depth
        check(inside, "budget", budget, f"within [0, L] = [0, {problems.depth}]")
        return budget

    def written(self, problems: Problems, budget: int | None = None) -> Tensor:
        """[B, T], True at the scratchpad and the answer."""
        budget = self._budget(problems, budget)
        begin = 2 + problems.source.shape[1] + self.num_goals
        columns = torch.arange(begin + budget + 2)
        written = (columns >= begin) & (columns != begin + budget)
        return written.expand(len(problems), -1)

    def prompt(self, problems: Problems, budget: int | None = None) -> Tensor:
        """The rows of `render` with [MASK] at what is to be written."""
        ids, hidden = self.render(problems, budget), self.written(problems, budget)
        return ids.masked_fill(hidden, self.tokenizer.mask_token_id)

    def parse(self, ids: Int[Tensor, "B T"], depth: int) -> Problems:
        """The problems that rows of one depth pose; the path is found by walking.

        Raises:
            ValueError: a row that is not laid out like one of `render` at this depth.
        """
        count = self.edges_in(depth)
        shapes = [count, self.num_goals, 1]
        check(ids.shape[1] > sum(shapes), "ids.shape", tuple(ids.shape), "longer rows")
        edges, goals, start = ids[:, 1 : 1 + sum(shapes)].split(shapes, 1)
        edges = edges - self.first - self.nodes
        goals, start = goals - self.first, start - self.first
        ends = [((x >= 0) & (x < self.nodes)).all() for x in (goals, start)]
        fine = all(ends) and bool((edges >= 0).all())
        check(fine, "ids", self.tokenizer.decode(ids[0]), f"rows of depth {depth}")
        source, target = edges // self.nodes, edges % self.nodes
        path = self.solve(source, target, start, goals, depth)
        return Problems(source, target, path, goals)

    def solve(self, source, target, start, goals, depth: int) -> Int[Tensor, "B L+1"]:
        """The L edges that lead from s to a goal, found backwards from the goals.

        Raises:
            ValueError: in some row no goal is L edges from s.
        """
        parent = torch.full((len(source), len(NAMES)), -1).scatter(1, target, source)
        chain = [goals]  # every node has one parent
        for _ in range(depth):
            above = parent.gather(1, chain[-1].clamp_min(0))
            chain.append(above.masked_fill(chain[-1] < 0, -1))
        paths = torch.stack(chain[::-1], 2)  # [B, G, L + 1]
        reached = paths[:, :, 0] == start
        found = bool(reached.any(1).all())
        check(found, "ids", "a row", f"a goal {depth} edges from s, in every row")
        return paths[torch.arange(len(paths)), reached.long().argmax(1)]

    def edges_in(self, depth: int) -> int:
        """Edges of a problem."""
        return 2 * depth

    # -- grades

    def grade(self, problems: Problems, ids: Int[Tensor, "B T"]) -> Bool[Tensor, " B"]:
        """Decision: whether the last token is the target that s reaches."""
        return ids[:, -1] == self.first + problems.path[:, -1].to(ids.device)

    def evidence(self, problems: Problems, ids: Tensor) -> Bool[Tensor, " B"]:
        """Whether the scratchpad holds the path, node by node, as far as it goes."""
        begin = 2 + problems.source.shape[1] + self.num_goals
        said = ids[:, begin:-2].cpu() - self.first
        return (said == problems.path[:, 1 : 1 + said.shape[1]]).all(1)

    def graph(self, problems: Problems, row: int = 0) -> nx.DiGraph:
        """One problem as a graph whose nodes are the names that the row uses."""
        edges = zip(problems.source[row], problems.target[row], strict=True)
        return nx.DiGraph([(NAMES[int(a)], NAMES[int(b)]) for a, b in edges])

    # -- the frozen evaluation sets

    def frozen(self, depth: int) -> Problems:
        """The problems of data/eval that every model of this task is judged on.

        Raises:
            ValueError: no such file for this depth.
        """
        path = frozen_path(self.name, depth)
        check(path.is_file(), "depth", depth, f"one with a file like {path.name}")
        lines = map(json.loads, path.read_text().splitlines())
        rows = self.tokenizer([line["problem"] for line in lines])["input_ids"]
        return self.parse(torch.tensor(rows), depth)

    def draw_frozen(self, depth: int) -> Problems:
        """The evaluation set of a depth, drawn anew; it comes out the same."""
        generator = torch.Generator().manual_seed(FROZEN_SEED + depth)
        return self.sample(FROZEN_ROWS, generator, depth, evaluation=True)

    def write_frozen(self, depth: int) -> None:
        """Store the evaluation set of a depth under data/eval."""
        rows = self.tokenizer.batch_decode(self.render(self.draw_frozen(depth)))
        path = frozen_path(self.name, depth)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"problem": row}) + "\n" for row in rows))


if __name__ == "__main__":
    for length in FROZEN_DEPTHS:
        TwoPaths().write_frozen(length)
