"""The bridge graph: at every junction a short way, a long way and a dead end.

Two copies of it lie side by side; s is the first junction of one, and the two goals are
the last junctions of both. Edges have no direction. The short way is the shortest path,
but no junction shows which way is short; only a search that turns back is sure.
"""

import random
from itertools import pairwise

import networkx as nx
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.errors import check
from dlmlib.tasks.connectivity import TwoPaths
from dlmlib.tasks.graph_problems import Problems, shuffled

TRACES = ("shortest", "path", "search")


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


def depth_first(graph: nx.Graph, start, goal, draw: random.Random) -> list:
    """Nodes of a depth-first search in random order, steps back included, to the goal.

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

    A row is `[BOS] edges goals s trace = answer`, filled up with [EOS]. The trace is

    - "shortest": the shortest path, short ways only;
    - "path": a path without mistakes, short or long with even chances;
    - "search": a depth-first search, its steps back included.

    Args:
        depth: junctions after s.
        trace: see above.
        short, long, dead: lengths in edges.
        nodes: labels to draw from.

    Raises:
        ValueError: an unknown trace, lengths below 1 or too few labels.

    Source: Mirtaheri et al. (arXiv 2505.21825), the bridge graph and its traces.
    Introduced in notebook 14.
    """

    name = "bridge"

    def __init__(
        self,
        depth: int = 2,
        trace: str = "search",
        short: int = 3,
        long: int = 5,
        dead: int = 3,
        nodes: int | None = None,
    ):
        check(trace in TRACES, "trace", trace, f"one of {TRACES}")
        lengths = (short, long, dead)
        check(min(lengths) >= 1 and short + long > 2, "lengths", lengths, "1 or more")
        self.ways, self.trace = lengths, trace
        graph = template(depth, *lengths)
        self.size = graph.number_of_nodes()
        self.skeleton = torch.tensor(list(graph.edges))  # [E, 2]
        nodes = 2 * self.size if nodes is None else nodes
        super().__init__((depth, depth), nodes, truncated=0.0)

    def nodes_needed(self, depth: int) -> int:
        """Nodes of both copies."""
        return 2 * (1 + depth * (sum(self.ways) - 1))

    def edges_in(self, depth: int) -> int:
        """Edges of both copies."""
        return 2 * depth * sum(self.ways)

    def row_length(self, depth: int) -> int:
        """Bound on T: a search writes every edge of its copy at most twice."""
        longest = {
            "shortest": depth * self.ways[0],
            "path": depth * max(self.ways[:2]),
            "search": 2 * depth * sum(self.ways),
        }[self.trace]
        return 1 + self.edges_in(depth) + self.num_goals + 1 + longest + 2

    def _draw(self, n: int, depth: int, generator: torch.Generator) -> Problems:
        labels = self.labels(n, depth, generator).view(n, 2, self.size)
        edges = shuffled(labels[:, :, self.skeleton].flatten(1, 2), generator)
        flip = torch.rand(edges.shape[:2], generator=generator) < 0.5
        edges = torch.where(flip[..., None], edges.flip(2), edges)
        goals = shuffled(labels[:, :, -1], generator)
        graph = template(depth, *self.ways)
        way = torch.tensor(nx.shortest_path(graph, 0, self.size - 1))
        return Problems(edges[..., 0], edges[..., 1], labels[:, 0, way], goals)

    def solve(self, source, target, start, goals, depth: int) -> Tensor:
        """The shortest path of each problem from s to the goal that it reaches."""
        paths = []
        edges = torch.stack([source, target], 2).tolist()
        for listed, [first], ends in zip(
            edges, start.tolist(), goals.tolist(), strict=True
        ):
            found = nx.single_source_shortest_path(nx.Graph(listed), first)
            paths += [found[end] for end in ends if end in found]
        return torch.tensor(paths)

    def graph(self, problems: Problems, row: int = 0) -> nx.Graph:
        """One problem as an undirected graph of names."""
        return super().graph(problems, row).to_undirected()

    def thoughts(self, problems: Problems, generator: torch.Generator) -> list[list]:
        """A trace for every problem, as node numbers, s left out."""
        if self.trace == "shortest":
            return problems.path[:, 1:].tolist()
        seed = int(torch.randint(2**31, (), generator=generator))
        draw, traces = random.Random(seed), []
        ends = problems.path[:, [0, -1]].tolist()
        edges = torch.stack([problems.source, problems.target], 2).tolist()
        for listed, (start, goal) in zip(edges, ends, strict=True):
            trace = depth_first(nx.Graph(listed), start, goal, draw)
            traces.append((loop_free(trace) if self.trace == "path" else trace)[1:])
        return traces

    def rows(self, problems: Problems, thoughts: list[list]) -> Int[Tensor, "B T"]:
        """Token ids with the given traces, filled up with [EOS]."""
        eos, bare = self.tokenizer.eos_token_id, []
        answers = problems.path[:, -1].tolist()
        for trace, answer in zip(thoughts, answers, strict=True):
            nodes = [self.first + node for node in trace]
            bare.append(torch.tensor([*nodes, self.equals, self.first + answer]))
        told = torch.nn.utils.rnn.pad_sequence(bare, True, padding_value=eos)
        return torch.cat([self.prompt(problems), told], 1)

    def prompt(self, problems: Problems) -> Int[Tensor, "B P"]:
        """[BOS], edges, goals and s."""
        start = problems.path[:, :1] + self.first
        return torch.cat([self.head(problems), start], 1)

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A training batch of n fresh problems with traces of the task's kind."""
        problems = self.sample(n, generator)
        ids = self.rows(problems, self.thoughts(problems, generator))
        written = ids != self.tokenizer.eos_token_id
        written[:, : self.prompt(problems).shape[1]] = False
        return {"input_ids": ids, "maskable": written}

    def judge(
        self, problems: Problems, written: Int[Tensor, "B n"]
    ) -> tuple[Bool[Tensor, " B"], Bool[Tensor, " B"]]:
        """Decision and evidence: the answer is right; the trace is a walk to the goal.

        Args:
            problems: B of them.
            written: what was written after the prompts.
        """
        decided, proved = [], []
        for row, ids in enumerate(written.tolist()):
            end = ids.index(self.equals) if self.equals in ids[:-1] else len(ids) - 1
            path = problems.path[row].tolist()
            start, goal = path[0], path[-1]
            decided.append(
                ids[end] == self.equals and ids[end + 1] - self.first == goal
            )
            steps = [start, *(i - self.first for i in ids[:end])]
            listed = zip(
                problems.source[row].tolist(),
                problems.target[row].tolist(),
                strict=True,
            )
            edges = {frozenset(edge) for edge in listed}
            walked = all(frozenset(pair) in edges for pair in pairwise(steps))
            proved.append(walked and steps[-1] == goal)
        return torch.tensor(decided), torch.tensor(proved)


def loop_free(trace: list) -> list:
    """A walk without its detours: what lies between two visits of a node is dropped."""
    path = []
    for node in trace:
        path = path[: path.index(node) + 1] if node in path else [*path, node]
    return path
