"""The bridge graph: at every junction a short way, a long way and a dead end.

Two copies of it lie side by side; s is the first junction of one, and the two goals are
the last junctions of both. Edges have no direction. The short way is the shortest path,
but no junction shows which way is short; only a search that turns back is sure.
"""

import random
from itertools import combinations, pairwise

import networkx as nx
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.errors import check
from dlmlib.tasks.connectivity import EQUALS, UNKNOWN, TwoPaths
from dlmlib.tasks.dead_ends import answer_after
from dlmlib.tasks.graph_problems import NAMES, Problems, shuffled
from dlmlib.text import word_tokenizer

TRACES = ("shortest", "path", "search")
FROZEN_LEVELS = range(1, 3)


def template(depth: int, short: int, long: int, dead: int) -> nx.Graph:
    """One bridge graph; node 0 is the first junction, the last node the last one.

    Every level adds short + long + dead edges and as many nodes less one.
    """
    graph, junction = nx.Graph(), 0
    for _ in range(depth):
        fresh = junction + 1
        far = junction + short + long + dead - 1
        for edges, end in ((dead, None), (long, far), (short, far)):
            inner = list(range(fresh, fresh + edges - (end is not None)))
            fresh += len(inner)
            nx.add_path(graph, [junction, *inner, *[end] * (end is not None)])
        junction = far
    return graph


def depth_first(graph, start, goal, draw: random.Random) -> list:
    """Nodes of a depth-first search in random order, steps back included, to the goal.

    Args:
        graph: `graph[node]` lists the neighbours of a node.

    Introduced in notebook 14.
    """
    trail, seen, trace = [start], {start}, [start]
    while trail[-1] != goal:
        fresh = [node for node in graph[trail[-1]] if node not in seen]
        if fresh:
            trail.append(draw.choice(fresh))
            seen.add(trail[-1])
        else:
            trail.pop()
        trace.append(trail[-1])
    return trace


class Bridge(TwoPaths):
    """The bridge graph and its three kinds of scratchpad.

    A row is `[BOS] edges goals mode s trace = answer`, filled up with [EOS]; an edge
    `a-b` is one token. The mode is a word that says which trace is wanted:

    - "shortest": the shortest path, short ways only;
    - "path": a path without mistakes, short or long with even chances;
    - "search": a depth-first search, its steps back included.

    A training batch has one number of levels d, drawn with weight 1/d, and rows of all
    modes.

    Args:
        depths: smallest and largest number of levels, junctions after s.
        short, long, dead: lengths in edges; the paper's are 3, 5 and 3.
        nodes: labels to draw from; default: as many as the largest problem needs.

    Raises:
        ValueError: lengths below 1, wrong depths or too few labels.

    Source: Mirtaheri et al. (arXiv 2505.21825), the bridge graph and its traces.
    Introduced in notebook 14.
    """

    name = "bridge"

    def __init__(
        self,
        depths: tuple[int, int] = (1, 2),
        short: int = 2,
        long: int = 3,
        dead: int = 2,
        nodes: int | None = None,
    ):
        lengths = (short, long, dead)
        check(min(lengths) >= 1 and short + long > 2, "lengths", lengths, "1 or more")
        self.ways = lengths
        nodes = self.nodes_needed(depths[1]) if nodes is None else nodes
        super().__init__(depths, nodes, truncated=0.0)
        names = NAMES[:nodes]
        self.pairs = torch.tensor(list(combinations(range(nodes), 2)))  # low < high
        edges = [f"{a}-{b}" for a, b in combinations(names, 2)]
        self.tokenizer = word_tokenizer([EQUALS, UNKNOWN, *names, *edges, *TRACES])
        self.modes = {m: self.tokenizer.convert_tokens_to_ids(m) for m in TRACES}

    # -- problems

    def nodes_needed(self, depth: int) -> int:
        """Nodes of both copies."""
        return 2 * (1 + depth * (sum(self.ways) - 1))

    def edges_in(self, depth: int) -> int:
        """Edges of both copies."""
        return 2 * depth * sum(self.ways)

    def row_length(self, depth: int) -> int:
        """Bound on T."""
        return 1 + self.edges_in(depth) + self.num_goals + 2 + self.room(depth)

    def room(self, depth: int) -> int:
        """Bound on trace, `=` and answer: a search walks an edge at most twice."""
        return 2 * depth * sum(self.ways) + 2

    def _draw(self, n: int, depth: int, generator: torch.Generator) -> Problems:
        graph = template(depth, *self.ways)
        size = graph.number_of_nodes()
        labels = self.labels(n, depth, generator).view(n, 2, size)
        edges = labels[:, :, torch.tensor(list(graph.edges))].flatten(1, 2)
        low, high = shuffled(edges, generator).sort(2).values.unbind(2)
        goals = shuffled(labels[:, :, -1], generator)
        way = torch.tensor(nx.shortest_path(graph, 0, size - 1))
        return Problems(low, high, labels[:, 0, way], goals)

    def parse(self, ids: Int[Tensor, "B T"], depth: int) -> Problems:
        """The problems that rows of one depth pose.

        Raises:
            ValueError: a row that is not laid out like one of `render` at this depth.
        """
        begin, edges = self.first + self.nodes, slice(1, 1 + self.edges_in(depth))
        listed = ids[:, edges] - begin
        fine = bool(((listed >= 0) & (listed < len(self.pairs))).all())
        check(fine, "ids", self.tokenizer.decode(ids[0]), f"rows of depth {depth}")
        low, high = self.pairs[listed].unbind(-1)
        ids = ids.clone()
        ids[:, edges] = begin + low * self.nodes + high
        return super().parse(ids, depth)

    def solve(self, source, target, start, goals, depth: int) -> Tensor:
        """The shortest path of each problem from s to the goal that it reaches.

        Raises:
            ValueError: in some row s reaches no goal, or both.
        """
        paths = []
        edges = torch.stack([source, target], 2).tolist()
        for listed, [first], ends in zip(
            edges, start.tolist(), goals.tolist(), strict=True
        ):
            graph = nx.Graph([*listed, (first, first)])
            found = nx.single_source_shortest_path(graph, first)
            reached = [found[end] for end in ends if end in found]
            check(len(reached) == 1, "goals", ends, "one of two within reach of s")
            paths += reached
        return torch.tensor(paths)

    def graph(self, problems: Problems, row: int = 0) -> nx.Graph:
        """One problem as an undirected graph of names."""
        return super().graph(problems, row).to_undirected()

    # -- rows

    def head(self, problems: Problems) -> Int[Tensor, "B P"]:
        """[BOS], edges and goals."""
        index = torch.zeros(self.nodes, self.nodes, dtype=torch.long)
        index[tuple(self.pairs.T)] = torch.arange(len(self.pairs))
        edges = index[problems.source, problems.target] + self.first + self.nodes
        bos = torch.full_like(edges[:, :1], self.tokenizer.bos_token_id)
        return torch.cat([bos, edges, self.first + problems.goals], 1)

    def prompt(self, problems: Problems, mode: str = "search") -> Tensor:
        """[B, P]: [BOS], edges, goals, the mode and s.

        Raises:
            ValueError: an unknown mode.
        """
        check(mode in TRACES, "mode", mode, f"one of {TRACES}")
        start = problems.path[:, :1] + self.first
        how = torch.full_like(start, self.modes[mode])
        return torch.cat([self.head(problems), how, start], 1)

    def thoughts(
        self, problems: Problems, mode: str, generator: torch.Generator
    ) -> list[list[int]]:
        """A trace of a kind for every problem, as node numbers, s left out.

        Raises:
            ValueError: an unknown mode.
        """
        check(mode in TRACES, "mode", mode, f"one of {TRACES}")
        if mode == "shortest":
            return problems.path[:, 1:].tolist()
        seed = int(torch.randint(2**31, (), generator=generator))
        draw, traces = random.Random(seed), []
        for row, (start, *_, goal) in enumerate(problems.path.tolist()):
            trace = depth_first(self.neighbours(problems, row), start, goal, draw)
            traces.append((loop_free(trace) if mode == "path" else trace)[1:])
        return traces

    def neighbours(self, problems: Problems, row: int) -> dict[int, list[int]]:
        """The nodes beside each node of one problem, as numbers."""
        beside, ends = (
            {},
            (problems.source[row].tolist(), problems.target[row].tolist()),
        )
        for a, b in zip(*ends, strict=True):
            beside.setdefault(a, []).append(b)
            beside.setdefault(b, []).append(a)
        return beside

    def told(self, problems: Problems, thoughts: list[list]) -> Int[Tensor, "B n"]:
        """Token ids of the given traces, `=` and the answer, filled up with [EOS]."""
        eos, rows = self.tokenizer.eos_token_id, []
        for trace, answer in zip(thoughts, problems.path[:, -1].tolist(), strict=True):
            nodes = [self.first + node for node in trace]
            rows.append(torch.tensor([*nodes, self.equals, self.first + answer]))
        return torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=eos)

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A training batch of n fresh problems; half of its rows search."""
        problems, quarter = self.sample(n, generator), n // 4
        parts = (slice(0, quarter), slice(quarter, 2 * quarter), slice(2 * quarter, n))
        prompts, traces = [], []
        for mode, part in zip(TRACES, parts, strict=True):
            prompts.append(self.prompt(problems[part], mode))
            traces += self.thoughts(problems[part], mode, generator)
        prompt, told = torch.cat(prompts), self.told(problems, traces)
        written = told != self.tokenizer.eos_token_id
        return {
            "input_ids": torch.cat([prompt, told], 1),
            "maskable": torch.cat([torch.zeros_like(prompt, dtype=bool), written], 1),
        }

    # -- grades

    def answers(self, written: Int[Tensor, "B n"]) -> Int[Tensor, " B"]:
        """The token after the first `=` of each written part; `?` without one."""
        return answer_after(written, self.equals, self.unknown)

    def judge(
        self, problems: Problems, written: Int[Tensor, "B n"]
    ) -> tuple[Bool[Tensor, " B"], Bool[Tensor, " B"]]:
        """Decision and evidence: the answer is right; the trace is a walk to the goal.

        Args:
            problems: B of them.
            written: what was written after the prompts.
        """
        decided = self.answers(written) == problems.path[:, -1] + self.first
        proved = []
        for row, ids in enumerate(written.tolist()):
            end = ids.index(self.equals) if self.equals in ids else len(ids)
            start, *_, goal = problems.path[row].tolist()
            steps = [start, *(i - self.first for i in ids[:end])]
            beside = self.neighbours(problems, row)
            walked = all(b in beside.get(a, ()) for a, b in pairwise(steps))
            proved.append(walked and steps[-1] == goal)
        return decided, torch.tensor(proved)


def loop_free(trace: list) -> list:
    """A walk without its detours: what lies between two visits of a node is dropped."""
    path = []
    for node in trace:
        path = path[: path.index(node) + 1] if node in path else [*path, node]
    return path


if __name__ == "__main__":
    for levels in FROZEN_LEVELS:
        Bridge().write_frozen(levels)
