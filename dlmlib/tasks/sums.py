"""Running sums: one text whose order of dependence is a setting.

    [BOS] a_1 … a_n   s_1 … s_n      s_i = s_{i-1} + a_i  (mod m)

The sums are cut into streams that each start anew, from one long chain to n separate
terms, and the terms can stand in another order on the page. Length, vocabulary and the
distribution of the prompt are the same for all of them.
"""

from functools import cached_property
from math import gcd

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.errors import check
from dlmlib.text import word_tokenizer


class RunningSums:
    """n terms modulo m; each of `streams` equal parts is summed on its own.

    Args:
        terms: n.
        modulus: m; digits 0 … m - 1.
        streams: 1 for a chain of n sums, n for sums of one term (a copy).
        stride: term i stands in column stride · i mod n, in prompt and answer alike; 1
            is the order of the sums.
    Raises:
        ValueError: streams that do not divide n, or a stride that meets a column twice.
    Introduced in notebook 11.
    """

    def __init__(
        self, terms: int = 12, modulus: int = 7, streams: int = 1, stride: int = 1
    ):
        check(modulus >= 2, "modulus", modulus, "an integer >= 2")
        fits = streams >= 1 and terms >= 1 and terms % streams == 0
        check(fits, "streams", streams, f"a divisor of terms = {terms}")
        check(gcd(stride, terms) == 1, "stride", stride, f"coprime to {terms}")
        self.terms, self.modulus, self.streams = terms, modulus, streams
        self.column = torch.arange(terms) * stride % terms  # of each term
        self.length = 1 + 2 * terms
        self.first = 4  # id of the digit 0

    @cached_property
    def tokenizer(self):
        """Digits as words."""
        return word_tokenizer([str(digit) for digit in range(self.modulus)])

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """n fresh problems for training: input_ids [n, T], and maskable [n, T].

        A share of each problem's terms, uniform on (0, 1), is 0. A network that has to
        learn from uniform terms alone may stay at chance for very long.

        Raises:
            ValueError: n < 1.
        """
        ids = self.sample(n, generator)
        share = torch.rand(n, 1, generator=generator)
        zero = torch.rand(n, self.terms, generator=generator) < share
        ids[:, 1 : self.terms + 1][zero] = self.first
        ids[:, self.terms + 1 :] = self.solve(ids)
        answer = torch.arange(self.length) > self.terms
        return {"input_ids": ids, "maskable": answer.expand(n, -1)}

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n T"]:
        """Draw n problems with uniform terms, solved.

        Raises:
            ValueError: n < 1.
        """
        check(n >= 1, "n", n, "an integer >= 1")
        shape = (n, self.terms)
        numbers = torch.randint(self.modulus, shape, generator=generator)
        ids = torch.full((n, self.length), self.tokenizer.bos_token_id)
        ids[:, 1 : self.terms + 1] = numbers + self.first
        ids[:, self.terms + 1 :] = self.solve(ids)
        return ids

    def solve(self, input_ids: Int[Tensor, "B P"]) -> Int[Tensor, "B n"]:
        """The right answer to each prompt, as tokens in their columns."""
        numbers = input_ids[:, 1 : self.terms + 1][:, self.column] - self.first
        parts = numbers.view(len(numbers), self.streams, -1)
        sums = parts.cumsum(2).flatten(1) % self.modulus
        answer = torch.empty_like(sums)
        answer[:, self.column] = sums + self.first
        return answer

    def grade(self, input_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B n"]:
        """Which columns of the answer are right."""
        return input_ids[:, self.terms + 1 :] == self.solve(input_ids)
