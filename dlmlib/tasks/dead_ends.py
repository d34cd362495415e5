"""Two paths with a dead end at every node: a short walk is a lottery, a search is not.

Every node of a path, the last excepted, has two children: the next node and a dead end.
A row is `[BOS] edges goals mode s trace = answer`. The mode says how to think:

- `walk`: go to either child until a node without children; there, answer the goal, or
  `?` when it is a dead end. It arrives with chance 2^-L.
- `search`: depth first. After a dead end d write its parent again, then the other
  child: `… v d v w …`. It always arrives, in L to 3L nodes.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.errors import check
from dlmlib.tasks.connectivity import TwoPaths
from dlmlib.tasks.graph_problems import Problems, shuffled
from dlmlib.text import word_tokenizer

MODES = ("walk", "search")
FROZEN_LENGTHS = range(1, 5)


class DeadEnds(TwoPaths):
    """The two-path problem with dead ends, and its two kinds of scratchpad.

    A training batch has one depth L, drawn with weight 1/L, and rows of both modes.
    The paths through the graph are drawn evenly, and so are learned as they are: a
    model's samples are random walks and random depth-first searches.

    Args:
        depths: smallest and largest L.
        nodes: labels to draw from, at least 4 L + 2.

    Source: after Mirtaheri et al. (arXiv 2505.21825), whose bridge graph has a dead end
    at every junction. Introduced in notebook 14.
    """

    name = "dead_ends"

    def __init__(self, depths: tuple[int, int] = (1, 4), nodes: int = 18):
        super().__init__(depths, nodes, truncated=0.0)
        words = list(self.tokenizer.get_vocab())
        words = sorted(words, key=self.tokenizer.get_vocab().get)[4:]
        self.tokenizer = word_tokenizer([*words, *MODES])
        self.modes = {m: self.tokenizer.convert_tokens_to_ids(m) for m in MODES}

    def nodes_needed(self, depth: int) -> int:
        return 4 * depth + 2

    def edges_in(self, depth: int) -> int:
        return 4 * depth

    def row_length(self, depth: int) -> int:
        return self.prompt_length(depth) + self.answer_length(depth)

    def prompt_length(self, depth: int) -> int:
        """Tokens up to and with s."""
        return 1 + self.edges_in(depth) + self.num_goals + 2

    def answer_length(self, depth: int, mode: str = "search") -> int:
        """Room for the longest trace of a mode, `=` and the answer."""
        return (depth if mode == "walk" else 3 * depth) + 2

    def _draw(self, n: int, depth: int, generator: torch.Generator) -> Problems:
        labels = self.labels(n, depth, generator)
        paths = labels[:, : 2 * (depth + 1)].view(n, 2, depth + 1)
        dead = labels[:, 2 * (depth + 1) :].view(n, 2, depth)
        forward = torch.stack([paths[..., :-1], paths[..., 1:]], -1)
        aside = torch.stack([paths[..., :-1], dead], -1)
        edges = shuffled(torch.cat([forward, aside], 2).flatten(1, 2), generator)
        goals = shuffled(paths[..., -1], generator)
        return Problems(edges[..., 0], edges[..., 1], paths[:, 0].clone(), goals)

    def dead_ends(self, problems: Problems) -> Int[Tensor, "B L"]:
        """The dead end beside each node of the path but the last."""
        zeros = problems.source.new_zeros(len(problems), self.nodes)
        children = zeros.scatter_add(1, problems.source, problems.target)
        return children.gather(1, problems.path[:, :-1]) - problems.path[:, 1:]

    def turns(self, problems: Problems, generator: torch.Generator) -> Tensor:
        """[B, L], True where the dead end is tried first: a fair coin at each node."""
        shape = (len(problems), problems.depth)
        return torch.rand(shape, generator=generator) < 0.5

    def trace(
        self, problems: Problems, turns: Bool[Tensor, "B L"], mode: str
    ) -> Int[Tensor, "B n"]:
        """Trace, `=` and answer in token ids, filled up with [EOS].

        Args:
            problems: of one depth.
            turns: at which nodes the dead end is tried first.
            mode: "walk" or "search".
        Raises:
            ValueError: an unknown mode.
        """
        check(mode in MODES, "mode", mode, f"one of {MODES}")
        path, dead = problems.path, self.dead_ends(problems)
        levels = torch.stack([dead, path[:, :-1], path[:, 1:]], 2)  # [B, L, 3]
        keep = torch.stack([turns, turns, torch.ones_like(turns)], 2)
        answer, tail = path[:, -1:] + self.first, torch.ones_like(turns[:, :1])
        if mode == "walk":
            lost = turns.cumsum(1)  # how often the walk has turned off so far
            keep[..., 0] &= lost == 1
            keep[..., 1], keep[..., 2] = False, lost == 0
            answer = answer.masked_fill(turns.any(1, keepdim=True), self.unknown)
        equals = torch.full_like(answer, self.equals)
        tokens = torch.cat([levels.flatten(1) + self.first, equals, answer], 1)
        keep = torch.cat([keep.flatten(1), tail, tail], 1)
        order = keep.long().argsort(dim=1, descending=True, stable=True)
        eos = self.tokenizer.eos_token_id
        tokens = tokens.masked_fill(~keep, eos).gather(1, order)
        return tokens[:, : self.answer_length(problems.depth, mode)]

    def prompt(self, problems: Problems, mode: str = "search") -> Tensor:
        """[B, P]: edges, goals, the mode and s."""
        check(mode in MODES, "mode", mode, f"one of {MODES}")
        start = problems.path[:, :1] + self.first
        how = torch.full_like(start, self.modes[mode])
        return torch.cat([self.head(problems), how, start], 1)

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A training batch; a quarter of its rows walk, since searching is harder."""
        problems = self.sample(n, generator)
        turns, quarter = self.turns(problems, generator), -(-n // 4)
        walk, search = slice(0, quarter), slice(quarter, n)
        rows = []
        for mode, part in (("walk", walk), ("search", search)):
            told = self.trace(problems[part], turns[part], mode)
            room = self.answer_length(problems.depth) - told.shape[1]
            told = torch.nn.functional.pad(told, (0, room), value=2)
            rows.append(torch.cat([self.prompt(problems[part], mode), told], 1))
        ids = torch.cat(rows)
        written = ids != self.tokenizer.eos_token_id
        written[:, : self.prompt_length(problems.depth)] = False
        return {"input_ids": ids, "maskable": written}

    def answers(self, ids: Int[Tensor, "B n"]) -> Int[Tensor, " B"]:
        """The token after the first `=` of each written part; `?` without one."""
        return answer_after(ids, self.equals, self.unknown)


def answer_after(ids: Int[Tensor, "B n"], equals: int, unknown: int) -> Tensor:
    """[B], the token after the first `equals` of each row; `unknown` without one."""
    at = (ids == equals).long()
    place = at.argmax(1, keepdim=True) + 1
    said = ids.gather(1, place.clamp_max(ids.shape[1] - 1))[:, 0]
    missing = (at.sum(1) == 0) | (place[:, 0] >= ids.shape[1])
    return said.masked_fill(missing, unknown)


if __name__ == "__main__":
    for length in FROZEN_LENGTHS:
        DeadEnds().write_frozen(length)
