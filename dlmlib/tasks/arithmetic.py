"""Chains of operations modulo a prime: serial work with an answer one can check.

"3 +5 *2 +0 =" asks for (((3 + 5) * 2) + 0) mod 7. A chain writes every running total,
here 1 2 2, and ends with the answer. Adding and multiplying do not commute, so there is
no shortcut around the order; +0 and *1 change nothing and make a problem easy. The
number of operations that do change the total is the problem's depth.
"""

import re

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.errors import check
from dlmlib.text import BOS, EOS, PAD, word_tokenizer

FORMS = ("answer", "chain", "sentence")
SPLITS = ("train", "test")
HELD_OUT = 8  # one problem in so many is never trained on


class Arithmetic:
    """Problems of up to N operations, their scratchpads and their answers.

    A row is [BOS], a number, N slots for operations (unused ones hold [PAD]), "=", and
    the completion of C tokens, for "3 +5 *2 +0" one of

        answer    2
        chain     1 2 2 [EOS] …
        sentence  1 2 2 so … so answer is 2 [EOS] …

    In a sentence the number of fillers "so" is uniform over all that fit, so that the
    place of the answer is not known beforehand. Operation i and its total are always
    N + 1 columns apart. A hash of its words puts a problem into the training or the
    test split, whatever the form.

    Args:
        form: "answer", "chain" or "sentence".
        operations: N, the most of a problem.
        fewest: the fewest; their number is uniform in fewest … N. None means N.
        operators: "+*", or "+" for plain sums, which are learned faster.
        neutral: probability that an operation changes nothing; None draws it per
            problem from U(0, 1), which makes all depths about equally common.
        spare: columns of a sentence beyond the shortest that fits N totals.
        modulus: m, a prime.
    Attributes:
        tokenizer, length: its tokenizer and T.
        prompt_length: columns up to and including "=".
    Raises:
        ValueError: an argument out of range.
    Introduced in notebook 08.
    """

    def __init__(
        self,
        form: str = "chain",
        operations: int = 8,
        fewest: int | None = None,
        operators: str = "+*",
        neutral: float | None = None,
        spare: int = 5,
        modulus: int = 7,
    ):
        check(form in FORMS, "form", form, f"one of {FORMS}")
        check(operations >= 1, "operations", operations, "an integer >= 1")
        fewest = operations if fewest is None else fewest
        check(1 <= fewest <= operations, "fewest", fewest, f"within 1 … {operations}")
        check(operators in ("+", "+*"), "operators", operators, "'+' or '+*'")
        usual = neutral is None or 0 <= neutral <= 1
        check(usual, "neutral", neutral, "a probability, or None")
        check(spare >= 0, "spare", spare, "an integer >= 0")
        prime = modulus >= 3 and all(modulus % k for k in range(2, modulus))
        check(prime, "modulus", modulus, "an odd prime")
        self.form, self.operations, self.fewest = form, operations, fewest
        self.neutral, self.modulus = neutral, modulus

        self._name_tokens(operators)
        self.prompt_length = operations + 3
        extra = {"answer": 1, "chain": operations, "sentence": operations + 3 + spare}
        self.completion_length = extra[form]
        self.length = self.prompt_length + self.completion_length

    def _name_tokens(self, operators: str) -> None:
        """The vocabulary, what a token makes of each total, and what may be drawn."""
        values = range(self.modulus)
        adding = {f"+{k}": lambda total, k=k: total + k for k in values}
        scaling = {f"*{k}": lambda total, k=k: total * k for k in values if k > 0}
        rules = adding | scaling  # no *0, which would forget what came before
        words = [*map(str, values), *rules, "=", "so", "answer", "is"]
        self.tokenizer = word_tokenizer(words)
        self.id = self.tokenizer.get_vocab()
        self.zero = self.id["0"]  # the other numbers follow it

        total = torch.arange(self.modulus)
        self.effect = total.repeat(len(self.id), 1)  # [V, m]; by default none
        for word, rule in rules.items():
            self.effect[self.id[word]] = rule(total) % self.modulus
        self.changes = (self.effect != total).any(1)  # [V]
        drawn = torch.tensor([self.id[word] for word in rules if word[0] in operators])
        self.neutral_ids = drawn[~self.changes[drawn]]
        self.active_ids = drawn[self.changes[drawn]]

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A training batch: input_ids [n, T] and maskable [n, T], the completion.

        Raises:
            ValueError: n < 1.
        """
        ids = self.sample(n, generator)
        maskable = torch.zeros_like(ids, dtype=torch.bool)
        maskable[:, self.prompt_length :] = True
        return {"input_ids": ids, "maskable": maskable}

    def sample(
        self, n: int, generator: torch.Generator, split: str = "train"
    ) -> Int[Tensor, "n T"]:
        """Draw n solved problems of one split.

        Args:
            n: how many, at least 1.
            generator: a CPU generator.
            split: "train" or "test"; no problem is in both.
        Raises:
            ValueError: n < 1 or an unknown split.
        """
        check(n >= 1, "n", n, "an integer >= 1")
        check(split in SPLITS, "split", split, f"one of {SPLITS}")
        problems = torch.empty(0, self.operations + 1, dtype=torch.long)
        while len(problems) < n:
            drawn = self._draw(n, generator)
            wanted = self.held_out(drawn) == (split == "test")
            problems = torch.cat([problems, drawn[wanted]])
        return self._solved(problems[:n], generator)

    def _draw(self, n: int, generator: torch.Generator) -> Int[Tensor, "n N+1"]:
        """A number and N operations, [PAD] after the last of a shorter problem."""

        def pick(choices: Tensor, *shape: int) -> Tensor:
            return choices[torch.randint(len(choices), shape, generator=generator)]

        slots = (n, self.operations)
        count = torch.randint(
            self.fewest, self.operations + 1, (n, 1), generator=generator
        )
        share = torch.rand(n, 1, generator=generator)
        if self.neutral is not None:
            share = torch.full_like(share, self.neutral)
        easy = torch.rand(slots, generator=generator) < share
        chosen = torch.where(
            easy, pick(self.neutral_ids, *slots), pick(self.active_ids, *slots)
        )
        unused = torch.arange(self.operations) >= count
        chosen = chosen.masked_fill(unused, self.tokenizer.pad_token_id)
        start = pick(self.zero + torch.arange(self.modulus), n, 1)
        return torch.cat([start, chosen], dim=1)

    def held_out(self, problems: Int[Tensor, "n N+1"]) -> Bool[Tensor, " n"]:
        """True for problems of the test split, by a hash of their words."""
        value = torch.zeros(len(problems), dtype=torch.long)
        for token in problems.T:
            padding = token == self.tokenizer.pad_token_id
            value = torch.where(padding, value, (value * 1009 + token + 1) % 1000003)
        return value % HELD_OUT == 0

    def _solved(
        self, problems: Int[Tensor, "n N+1"], generator: torch.Generator | None
    ) -> Int[Tensor, "n T"]:
        """Whole rows; without a generator sentences have all the fillers that fit."""
        n, specials = len(problems), self.tokenizer
        begin = problems.new_full((n, 1), specials.bos_token_id)
        equals = problems.new_full((n, 1), self.id["="])
        totals = self.totals(problems)
        if self.form == "answer":
            work = totals[:, -1:] + self.zero
        else:
            work = self._scratchpad(problems, totals, generator)
        return torch.cat([begin, problems, equals, work], dim=1)

    def _scratchpad(self, problems, totals, generator) -> Int[Tensor, "n C"]:
        """Running totals, then the end of a chain or of a sentence."""
        column = torch.arange(self.completion_length)
        count = (problems[:, 1:] != self.tokenizer.pad_token_id).sum(1, keepdim=True)
        work = totals.new_full(
            (len(problems), self.completion_length), self.tokenizer.eos_token_id
        )
        work[:, : self.operations] = totals + self.zero
        work = work.masked_fill(column >= count, self.tokenizer.eos_token_id)
        if self.form == "chain":
            return work
        latest = self.completion_length - 3
        place = torch.full_like(count, latest)
        if generator is not None:
            u = torch.rand(count.shape, generator=generator)
            place = count + (u * (latest + 1 - count)).long()
        so = (column >= count) & (column < place)
        work = work.masked_fill(so, self.id["so"])
        work.scatter_(1, place, self.id["answer"])
        work.scatter_(1, place + 1, self.id["is"])
        return work.scatter_(1, place + 2, totals[:, -1:] + self.zero)

    def totals(self, problems: Int[Tensor, "n N+1"]) -> Int[Tensor, "n N"]:
        """The total after each operation, as a number; [PAD] leaves it alone."""
        total, seen = problems[:, 0] - self.zero, []
        for operation in problems[:, 1:].T:
            total = self.effect[operation, total]
            seen.append(total)
        return torch.stack(seen, dim=1)

    def problems(self, sequences: Int[Tensor, "B T"]) -> Int[Tensor, "B N+1"]:
        """The number and the operations of each row."""
        return sequences[:, 1 : self.prompt_length - 1].cpu()

    def blank(
        self, sequences: Int[Tensor, "B T"], suffix: bool = False
    ) -> Int[Tensor, "B T"]:
        """The rows with every token of the completion masked: prompts for `decode`.

        Args:
            sequences: rows, solved or not.
            suffix: write "answer is" into the columns before the last (sentences only),
                so that the answer has a known place.
        Raises:
            ValueError: a suffix without the form "sentence".
        """
        check(not suffix or self.form == "sentence", "suffix", suffix, "a sentence")
        ids = sequences.clone()
        ids[:, self.prompt_length :] = self.tokenizer.mask_token_id
        if suffix:
            ids[:, -3], ids[:, -2] = self.id["answer"], self.id["is"]
        return ids

    def solve(self, sequences: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
        """The right answer to each row's problem, 0 … m - 1."""
        return self.totals(self.problems(sequences))[:, -1].to(sequences.device)

    def depth(self, sequences: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
        """How many operations of each row change the total."""
        operations = self.problems(sequences)[:, 1:]
        return self.changes[operations].sum(1).to(sequences.device)

    def parse(self, sequences: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
        """The answer each row states, 0 … m - 1; -1 if it states none.

        It is the last token before [EOS], or in a sentence what follows the first
        "answer is".
        """
        work = sequences[:, self.prompt_length :]
        width = work.shape[1]
        column = torch.arange(width, device=work.device)
        if self.form == "sentence":
            answer, is_ = work == self.id["answer"], work == self.id["is"]
            said = answer[:, :-2] & is_[:, 1:-1]
            place = torch.where(said, column[2:], width).amin(1)
        else:
            ended = work == self.tokenizer.eos_token_id
            place = torch.where(ended, column, width).amin(1) - 1
        there = (place >= 0) & (place < width)
        value = work.gather(1, place.clamp(0, width - 1)[:, None])[:, 0] - self.zero
        return value.masked_fill(~there | (value < 0) | (value >= self.modulus), -1)

    def grade(self, sequences: Int[Tensor, "B T"]) -> Bool[Tensor, " B"]:
        """True for rows that state the right answer; the work shown is not graded."""
        return self.parse(sequences) == self.solve(sequences)

    def render(self, sequence: Int[Tensor, " T"]) -> str:
        """One row as words, without [BOS], [PAD] and [EOS]."""
        words = self.tokenizer.convert_ids_to_tokens(sequence.tolist())
        return " ".join(word for word in words if word not in (BOS, PAD, EOS))

    def encode(self, problems: list[str]) -> Int[Tensor, "B T"]:
        """Solved rows of problems such as "3 +5 *2"; sentences end in the last column.

        Raises:
            ValueError: an unknown word, or not a number and 1 … N operations.
        """
        pattern = rf"\d+( [+*]\d+){{1,{self.operations}}}"
        wanted = f"a number and 1 … {self.operations} operations, as in '3 +5 *2'"
        rows = []
        for text in problems:
            check(re.fullmatch(pattern, text) is not None, "problems", text, wanted)
            ids = self.tokenizer.encode(text)
            padding = [self.tokenizer.pad_token_id] * (self.operations + 1 - len(ids))
            rows.append(ids + padding)
        return self._solved(torch.tensor(rows), None)


def freeze(task: Arithmetic, n: int, seed: int) -> list[dict]:
    """n problems of the test split: problem (words), answer and depth.

    Introduced in notebook 10.
    """
    rows = task.sample(n, torch.Generator().manual_seed(seed), split="test")
    facts = zip(rows, task.solve(rows).tolist(), task.depth(rows).tolist(), strict=True)
    return [
        dict(problem=task.render(row).split(" =")[0], answer=answer, depth=depth)
        for row, answer, depth in facts
    ]
