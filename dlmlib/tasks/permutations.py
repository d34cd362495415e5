"""Three cups, shuffled many times: the product of n permutations, written as steps.

A shuffle is one of the six arrangements of a, b, c; applied to the cups on the table it
moves what lies at its letters' places. Products do not commute, so that each step needs
the one before, and no count of the shuffles gives the answer away. The same product can
be written as one chain of running products, or as several streams that each multiply
their own share of the shuffles, then a summary that multiplies the shares: by
associativity both give the same answer, in the same number of written tokens.
"""

import json
from itertools import permutations
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.errors import check
from dlmlib.text import word_tokenizer

ARRANGEMENTS = tuple("".join(p) for p in permutations("abc"))  # "abc", the identity, …
FORMATS = ("chain", "streams", "answer")
HELD_OUT = 16  # one problem in so many is for evaluation only
FROZEN_SHARE, FROZEN_SEED, FROZEN_ROWS = 0.35, 20260223, 512


def product_table() -> Int[Tensor, "6 6"]:
    """table[p, q]: the cups p after shuffle q, whose i-th cup is p's q_i-th."""
    moves = list(permutations(range(3)))
    return torch.tensor(
        [[moves.index(tuple(p[i] for i in q)) for q in moves] for p in moves]
    )


def running_products(shuffles: Int[Tensor, "*B n"]) -> Int[Tensor, "*B n"]:
    """x_1, x_1 x_2, …, x_1 ⋯ x_n."""
    table, results = product_table(), [shuffles[..., 0]]
    for column in range(1, shuffles.shape[-1]):
        results.append(table[results[-1], shuffles[..., column]])
    return torch.stack(results, -1)


def held_out(shuffles: Int[Tensor, "B n"]) -> Bool[Tensor, " B"]:
    """Whether a problem is for evaluation: decided by a hash of its shuffles alone."""
    state = torch.full(shuffles.shape[:1], 1)
    for column in shuffles.T:
        state = ((state ^ column) * 0x01000193 + 1) % 2**31  # a step of FNV's kind
    return (state >> 13) % HELD_OUT == 0


class Permutations:
    """Products of n shuffles of three cups.

    A row is [BOS], the problem and its work, both in m lines of s = n / m tokens after
    a header `1:` … `m:`. The problem's lines hold the shuffles x_1 … x_n. By `format`,
    a line of the work holds:

    - "chain": the running products so far, ending in x_1 ⋯ x_ks on line k.
    - "streams": the s - 1 running products of its own s shuffles, which need no other
      line (a stream), then the product of all lines so far (the summary).
    - "answer": nothing; the only token of the work is the product, after `=`.

    Both ways write n tokens and end every line with the same one. Work stands at the
    same distance below its shuffles in each line, which a network with relative
    positions learns easily.

    A shuffle is the identity with chance p, else one of the other five. Training draws
    p ~ U(0, 1) for each problem, and lets each line be idle, all identities, with
    chance q ~ U(0, 1). With uniform shuffles the loss stays on a plateau; without idle
    lines the summary, which multiplies whole lines, stays there.

    Args:
        n: shuffles in a problem.
        format: see above.
        lines: m; the number of streams.
        reorder: put the lines of each row in random order, in problem and work alike.

    Attributes:
        tokenizer, length: its tokenizer and T.
        streams: columns to reason in, as a slice for each stream; one for a chain.
        summary: columns to write after the streams; None for a chain.
        written: [T] whether a column is to be written.

    Raises:
        ValueError: n < 2, an unknown format, or lines of unequal length or under two.

    Source: prefix products of S3, as in Liu et al. (arXiv 2210.10749); the two formats
    after NAP (arXiv 2602.23225). Introduced in notebook 13.
    """

    def __init__(
        self, n: int = 24, format: str = "chain", lines: int = 4, reorder: bool = False
    ):
        check(isinstance(n, int) and n >= 2, "n", n, "an integer >= 2")
        check(format in FORMATS, "format", format, f"one of {FORMATS}")
        fits = lines >= 1 and n % lines == 0 and n // lines >= 2
        check(fits, "lines", lines, f"a divisor of n = {n} that leaves 2 or more each")
        self.n, self.format, self.lines, self.reorder = n, format, lines, reorder
        self.share = n // lines
        headers = [f"{k + 1}:" for k in range(lines)]
        self.tokenizer = word_tokenizer([*ARRANGEMENTS, *headers, "="])
        self.first = self.tokenizer.convert_tokens_to_ids(ARRANGEMENTS[0])
        width, begin = self.share + 1, 1 + n + lines
        self.length = begin + (2 if format == "answer" else n + lines)
        starts = range(begin + 1, self.length, width)
        self.streams = [slice(c, c + self.share - 1) for c in starts]
        self.summary = slice(begin + self.share, self.length, width)
        if format == "chain":
            self.streams, self.summary = [slice(begin, self.length)], None
        if format == "answer":
            self.streams, self.summary = [], slice(self.length - 1, self.length)
        self.written = torch.arange(self.length) >= begin
        self.written[begin :: self.length if format == "answer" else width] = False

    # -- problems

    def sample(
        self,
        n: int,
        generator: torch.Generator,
        identities: float | None = None,
        evaluation: bool = False,
    ) -> Int[Tensor, "n N"]:
        """Draw n problems, from the training side or from the evaluation side.

        Args:
            n: how many, at least 1.
            generator: a CPU generator.
            identities: p, the chance that a shuffle is the identity, with q = 0; None
                draws both as in training.
            evaluation: problems that training never sees, see `held_out`.

        Returns:
            [n, N] indices into ARRANGEMENTS.

        Raises:
            ValueError: n < 1 or identities outside [0, 1].
        """
        check(n >= 1, "n", n, "an integer >= 1")
        inside = identities is None or 0 <= identities <= 1
        check(inside, "identities", identities, "None or a chance within [0, 1]")
        problems = self._draw(n, generator, identities)
        while (wrong := held_out(problems) != evaluation).any():
            problems[wrong] = self._draw(int(wrong.sum()), generator, identities)
        return problems

    def _draw(self, n, generator, identities) -> Int[Tensor, "n N"]:
        others = torch.randint(1, 6, (n, self.lines, self.share), generator=generator)
        p, q = torch.rand(2, n, 1, 1, generator=generator)
        if identities is not None:
            p, q = torch.full_like(p, identities), torch.zeros_like(q)
        moved = torch.rand(others.shape, generator=generator) >= p
        busy = torch.rand(n, self.lines, 1, generator=generator) >= q
        return (others * moved * busy).flatten(1)

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A training batch of n fresh solved problems.

        Returns:
            input_ids [n, T], and maskable [n, T]: the columns to write.
        """
        order = None
        if self.reorder:
            order = torch.rand(n, self.lines, generator=generator).argsort(1)
        ids = self.render(self.sample(n, generator), order)
        return {"input_ids": ids, "maskable": self.written.expand(n, -1)}

    # -- rows

    def render(
        self, problems: Int[Tensor, "B N"], order: Int[Tensor, "B m"] | None = None
    ) -> Int[Tensor, "B T"]:
        """Solved rows of token ids.

        Args:
            problems: [B, N] indices into ARRANGEMENTS.
            order: [B, m] which line stands first, second, …; default 1, 2, … m.

        Raises:
            ValueError: problems of another length, or not indices of arrangements.
        """
        shape = tuple(problems.shape)
        check(shape[1:] == (self.n,), "problems.shape", shape, f"[B, {self.n}]")
        known = bool(((problems >= 0) & (problems < len(ARRANGEMENTS))).all())
        check(known, "problems", problems, f"indices within [0, {len(ARRANGEMENTS)})")
        rows, shape = len(problems), (len(problems), self.lines, self.share)
        shares, work = problems.view(shape), running_products(problems).view(shape)
        if self.format == "streams":
            own = running_products(shares)[..., 1:]
            work = torch.cat([own, work[..., -1:]], -1)
        header = torch.arange(self.lines).expand(rows, -1) + len(ARRANGEMENTS)
        parts = [shares, work] if self.format != "answer" else [shares]
        parts = [torch.cat([header[..., None], part], -1) for part in parts]
        if order is not None:
            parts = [part.gather(1, order[..., None].expand_as(part)) for part in parts]
        parts = [self.first + part.flatten(1) for part in parts]
        if self.format == "answer":
            sign = torch.full((rows, 1), len(self.tokenizer) - 1)
            parts += [sign, self.first + self.solve(problems)]
        bos = torch.full((rows, 1), self.tokenizer.bos_token_id)
        return torch.cat([bos, *parts], 1)

    def prompt(self, problems, order=None) -> Int[Tensor, "B T"]:
        """The rows of `render` with [MASK] in every column that is to be written."""
        ids = self.render(problems, order)
        return ids.masked_fill(self.written, self.tokenizer.mask_token_id)

    def solve(self, problems: Int[Tensor, "B N"]) -> Int[Tensor, "B 1"]:
        """The product of each problem."""
        return running_products(problems)[:, -1:]

    def parse(self, text: str | list[str]) -> Int[Tensor, "B N"]:
        """Problems from text: "abc cab …", n arrangements a line.

        Raises:
            ValueError: a word that is no arrangement, or another number of them.
        """
        rows = []
        for line in [text] if isinstance(text, str) else text:
            words = line.split()
            check(len(words) == self.n, "text", line, f"{self.n} words")
            for word in words:
                check(word in ARRANGEMENTS, "word", word, f"one of {ARRANGEMENTS}")
            rows.append([ARRANGEMENTS.index(word) for word in words])
        return torch.tensor(rows)

    def grade(self, input_ids: Int[Tensor, "B T"]) -> Bool[Tensor, " B"]:
        """Whether the product of the row's shuffles, the last line's end, is right.

        Raises:
            ValueError: not [B, T].
        """
        right = self.right(input_ids)
        if not self.reorder or self.format == "answer":
            return right[:, -1]
        ends = self.written.nonzero()[:, 0].view(self.lines, -1)[:, -1]
        last = self.order(input_ids).argmax(1)
        return right.gather(1, ends[last, None])[:, 0]

    def right(self, input_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Which tokens are those of the solved row, whatever their context.

        Raises:
            ValueError: not [B, T].
        """
        shape = tuple(input_ids.shape)
        check(shape[1:] == (self.length,), "shape", shape, f"[B, {self.length}]")
        ids, order = input_ids.cpu(), self.order(input_ids)
        shown = self.lines_of(ids)[..., 1:] - self.first
        back = order.argsort(1)[..., None].expand_as(shown)
        return ids == self.render(shown.gather(1, back).flatten(1), order)

    def order(self, input_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B m"]:
        """Which line of the problem stands first, second, …, by the headers."""
        headers = self.lines_of(input_ids.cpu())[..., 0]
        return headers - self.first - len(ARRANGEMENTS)

    def lines_of(self, input_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B m s+1"]:
        """The problem's lines, headers first."""
        end = 1 + self.n + self.lines
        return input_ids[:, 1:end].view(len(input_ids), self.lines, -1)

    # -- the frozen evaluation set

    def frozen(self) -> Int[Tensor, "512 N"]:
        """The problems of data/eval that every format of this n is judged on.

        Raises:
            ValueError: no such file for this n.
        """
        path = frozen_path(self.n)
        check(path.is_file(), "n", self.n, f"one with a file like {path.name}")
        lines = map(json.loads, path.read_text().splitlines())
        return self.parse([line["shuffles"] for line in lines])


def frozen_path(n: int) -> Path:
    """Where the evaluation set of problems with n shuffles lies."""
    folder = Path(__file__).parents[2] / "data" / "eval"
    return folder / f"permutations_{n}.jsonl"


def write_frozen(n: int) -> None:
    """Draw the evaluation set of n shuffles anew; it comes out the same."""
    generator = torch.Generator().manual_seed(FROZEN_SEED)
    task = Permutations(n, lines=1)
    problems = task.sample(FROZEN_ROWS, generator, FROZEN_SHARE, evaluation=True)
    lines = []
    for row, (answer,) in zip(problems, task.solve(problems).tolist(), strict=True):
        words = " ".join(ARRANGEMENTS[x] for x in row)
        lines.append(json.dumps({"shuffles": words, "answer": ARRANGEMENTS[answer]}))
    frozen_path(n).parent.mkdir(parents=True, exist_ok=True)
    frozen_path(n).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_frozen(24)
