"""A problem that is told in parts: digits whose neighbours' sums arrive over turns.

The answer is D digits modulo m. Condition i says what digit i and digit i + 1 sum to;
with all D - 1 of them, m answers are right. Conditions come in shards, one a turn. An
answer given early is a guess about what was not said yet.

A quarter of the problems is held out: training rows never say all sums of one. Each
part of one may be said, and an early guess may happen to solve one.
"""

import json
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.errors import check
from dlmlib.text import word_tokenizer

SHARDS = ((0, 4), (2,), (1, 3))  # conditions of each turn, when there are five
PROTOCOLS = ("full", "concatenated", "sharded", "recap", "snowball")
DATA = ("single", "hindsight", "honest")
HELD_OUT = 4  # one problem in so many is for evaluation only
FROZEN_SEED = 20261121


def held_out(sums: Int[Tensor, "B D-1"]) -> Bool[Tensor, " B"]:
    """Whether a problem is for evaluation: decided by a hash of its sums alone."""
    state = torch.zeros(sums.shape[:1], dtype=torch.long)
    for column in sums.T:  # multiply and shift, modulo 2^31
        state = (state + column + 1) * 0x9E3779B1 % 2**31
        state = (state ^ (state >> 15)) * 0x85EBCA6B % 2**31
    return (state >> 11) % HELD_OUT == 0


def turns_of(protocol: str, shards=SHARDS) -> list[tuple[int, ...]]:
    """Conditions that each turn states.

    full: all in order; concatenated: all in the order of the shards; sharded: each
    once, when it is revealed; recap: sharded, then a last turn with all of them;
    snowball: every turn repeats what was said before.

    Raises:
        ValueError: for another protocol.
    Source: Laban et al. (arXiv 2505.06120), section 3. Introduced in notebook 16.
    """
    check(protocol in PROTOCOLS, "protocol", protocol, f"one of {PROTOCOLS}")
    said = [c for shard in shards for c in shard]
    if protocol == "full":
        return [tuple(sorted(said))]
    if protocol == "concatenated":
        return [tuple(said)]
    if protocol == "snowball":
        count = torch.tensor([len(shard) for shard in shards]).cumsum(0).tolist()
        return [tuple(said[:n]) for n in count]
    return [*shards, *([tuple(said)] if protocol == "recap" else [])]


class Sums:
    """What all layouts of the problem share: digits, conditions, and who is right.

    Args:
        modulus: m.
        digits: D.
        shards: conditions of each turn; together every condition once.
    Raises:
        ValueError: an argument out of range, or fewer than 64 problems.
    Introduced in notebook 16.
    """

    def __init__(self, modulus: int = 3, digits: int = 6, shards=SHARDS):
        check(modulus >= 2, "modulus", modulus, "an integer >= 2")
        enough = modulus ** (digits - 1) >= 64  # else one side might have none
        check(enough, "digits", digits, f"at least 64 problems modulo {modulus}")
        said = sorted(c for shard in shards for c in shard)
        check(said == list(range(digits - 1)), "shards", shards, "each condition once")
        self.modulus, self.digits, self.shards = modulus, digits, shards
        numbers = [str(value) for value in range(modulus)]
        names = [f"c{i + 1}" for i in range(digits - 1)]
        self.tokenizer = word_tokenizer([*numbers, *names, "?", ":"])
        vocabulary = self.tokenizer.get_vocab()
        self.zero, self.name = vocabulary["0"], vocabulary["c1"]
        self.unknown, self.colon = vocabulary["?"], vocabulary[":"]

    def problems(
        self, n: int, generator, evaluation: bool = False
    ) -> Int[Tensor, "n D-1"]:
        """The sums of random digits, so that every problem has an answer.

        Args:
            n: how many, at least 1.
            generator: a CPU generator.
            evaluation: problems that training never poses, see `held_out`.
        Raises:
            ValueError: n < 1.
        """
        check(n >= 1, "n", n, "an integer >= 1")
        sums = self.sums(self.answers(n, None, None, generator))
        while (wrong := held_out(sums) != evaluation).any():
            fresh = self.answers(int(wrong.sum()), None, None, generator)
            sums[wrong] = self.sums(fresh)
        return sums

    def frozen(self) -> Int[Tensor, "N D-1"]:
        """All held-out problems, as data/eval has them; the first n are a sample.

        Raises:
            ValueError: no such file for this modulus and number of digits.
        """
        path = frozen_path(self)
        check(path.is_file(), "modulus", self.modulus, f"one with a file {path.name}")
        lines = map(json.loads, path.read_text().splitlines())
        return torch.tensor([line["sums"] for line in lines])

    def sums(self, digits: Int[Tensor, "B D"]) -> Int[Tensor, "B D-1"]:
        """What neighbours sum to."""
        return (digits[:, :-1] + digits[:, 1:]) % self.modulus

    def answers(self, n: int, sums, known, generator) -> Int[Tensor, "n D"]:
        """Uniform draws among the digits that meet the known conditions.

        Args:
            n: rows.
            sums: [n, D-1], or None if nothing is known.
            known: [n, D-1] bool, or None.
            generator: a CPU generator.
        """
        digits = torch.randint(self.modulus, (n, self.digits), generator=generator)
        if known is None:
            return digits
        for i in range(self.digits - 1):
            follows = (sums[:, i] - digits[:, i]) % self.modulus
            digits[:, i + 1] = torch.where(known[:, i], follows, digits[:, i + 1])
        return digits

    def met(
        self, answer: Int[Tensor, "B D"], sums: Int[Tensor, "B D-1"]
    ) -> Bool[Tensor, "B D-1"]:
        """Which conditions an answer, as token ids, meets; none if it is no number."""
        digits = answer - self.zero
        number = (digits >= 0) & (digits < self.modulus)
        return (self.sums(digits) == sums) & number[:, :-1] & number[:, 1:]

    def grade(self, answer, sums) -> Bool[Tensor, " B"]:
        """Whether an answer meets every condition."""
        return self.met(answer, sums).all(1)


class Slots(Sums):
    """The layout of the diffusion model: a slot for each condition, then the digits.

    `[BOS] s1 … s5 : d1 … d6`, with "?" for a sum that was not said yet. Telling more
    changes a slot; the digits can stay, or be masked and written again.

    Introduced in notebook 16.
    """

    def __init__(self, modulus: int = 3, digits: int = 6, shards=SHARDS):
        super().__init__(modulus, digits, shards)
        self.prompt_length = 1 + digits
        self.length = self.prompt_length + digits

    def prompt(self, sums: Int[Tensor, "B D-1"], known) -> Int[Tensor, "B P"]:
        """The conditions said so far; `known` is [B, D-1] or [D-1] bool."""
        slots = torch.where(known, sums + self.zero, self.unknown)
        start = slots.new_full((len(slots), 1), self.tokenizer.bos_token_id)
        return torch.cat([start, slots, torch.full_like(start, self.colon)], dim=1)

    def known(self, turn: int) -> Bool[Tensor, " D-1"]:
        """What was said by the end of a turn, counted from 0."""
        said = [c for shard in self.shards[: turn + 1] for c in shard]
        known = torch.zeros(self.digits - 1, dtype=torch.bool)
        known[said] = True
        return known

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Rows in which each sum is known with a chance of its own, U(0, 1) a row."""
        sums = self.problems(n, generator)
        share = torch.rand(n, 1, generator=generator)
        known = torch.rand(sums.shape, generator=generator) < share
        answer = self.answers(n, sums, known, generator) + self.zero
        ids = torch.cat([self.prompt(sums, known), answer], dim=1)
        maskable = torch.zeros_like(ids, dtype=torch.bool)
        maskable[:, self.prompt_length :] = True
        return {"input_ids": ids, "maskable": maskable}


class Chat(Sums):
    """The layout of the autoregressive model: turns of conditions and answers.

    `[BOS] c1 2 c5 0 : d1 … d6 c3 1 : d1 … d6 …`. Half of the training rows say
    everything at once, full or concatenated; the other half are, by `data`,

        single     the same again
        hindsight  chats whose every answer is already the last one
        honest     chats whose every answer is drawn from what is known by then

    A batch's chats are all sharded, recap or snowball, in equal shares over batches.

    Introduced in notebook 16.
    """

    def __init__(
        self, data: str = "honest", modulus: int = 3, digits: int = 6, shards=SHARDS
    ):
        check(data in DATA, "data", data, f"one of {DATA}")
        super().__init__(modulus, digits, shards)
        self.data = data
        self.length = max(self.columns(turns_of(p, shards)) for p in PROTOCOLS)

    def columns(self, turns) -> int:
        """Tokens of a conversation."""
        return 1 + sum(2 * len(said) + 1 + self.digits for said in turns)

    def message(self, sums: Int[Tensor, "B D-1"], said) -> Int[Tensor, "B n"]:
        """One turn's conditions and the colon after them."""
        names = sums.new_tensor([self.name + c for c in said]).expand(len(sums), -1)
        pairs = torch.stack([names, sums[:, list(said)] + self.zero], dim=2)
        return torch.cat(
            [pairs.flatten(1), sums.new_full((len(sums), 1), self.colon)], 1
        )

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Training rows; maskable on the answers, [PAD] behind the shorter ones."""
        whole = n if self.data == "single" else n - n // 2
        parts = [
            self.conversation(whole, self.some(PROTOCOLS[:2], generator), generator)
        ]
        if n > whole:
            turns = self.some(PROTOCOLS[2:], generator)
            parts.append(self.conversation(n - whole, turns, generator))
        width = max(tokens.shape[1] for tokens, _ in parts)
        ids = torch.full((n, width), self.tokenizer.pad_token_id)
        maskable = torch.zeros_like(ids, dtype=torch.bool)
        row = 0
        for tokens, answers in parts:
            rows, columns = slice(row, row + len(tokens)), slice(0, tokens.shape[1])
            ids[rows, columns], maskable[rows, columns] = tokens, answers
            row += len(tokens)
        return {"input_ids": ids, "maskable": maskable}

    def some(self, protocols, generator) -> list[tuple[int, ...]]:
        """The turns of one of the protocols, drawn uniformly."""
        chosen = torch.randint(len(protocols), (), generator=generator)
        return turns_of(protocols[int(chosen)], self.shards)

    def conversation(self, n: int, turns, generator):
        """(tokens [n, T'], which are answers): conversations as the data has them."""
        sums = self.problems(n, generator)
        known = torch.zeros(n, self.digits - 1, dtype=torch.bool)
        final = self.answers(n, sums, torch.ones_like(known), generator)
        tokens = [torch.full((n, 1), self.tokenizer.bos_token_id)]
        scored = [torch.zeros(n, 1, dtype=torch.bool)]
        for said in turns:
            known[:, list(said)] = True
            guess = self.answers(n, sums, known, generator)
            answer = final if self.data == "hindsight" or known.all() else guess
            message = self.message(sums, said)
            tokens += [message, answer + self.zero]
            scored += [torch.zeros_like(message).bool(), torch.ones_like(answer).bool()]
        return torch.cat(tokens, 1), torch.cat(scored, 1)


def frozen_path(task: Sums) -> Path:
    """Where the evaluation set of a modulus and a number of digits lies."""
    folder = Path(__file__).parents[2] / "data" / "eval"
    return folder / f"revealed_{task.modulus}_{task.digits}.jsonl"


def write_frozen(task: Sums) -> None:
    """Store all held-out problems, in an order drawn once; it comes out the same."""
    every = torch.cartesian_prod(*[torch.arange(task.modulus)] * (task.digits - 1))
    chosen = every[held_out(every)]
    generator = torch.Generator().manual_seed(FROZEN_SEED)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    lines = [json.dumps({"sums": row}) + "\n" for row in chosen.tolist()]
    frozen_path(task).parent.mkdir(parents=True, exist_ok=True)
    frozen_path(task).write_text("".join(lines))


if __name__ == "__main__":
    write_frozen(Sums())
