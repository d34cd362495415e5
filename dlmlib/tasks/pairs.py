"""Sums of neighbours: the prompts of `Arithmetic`, with nothing serial about them."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.tasks.arithmetic import Arithmetic


class Pairs(Arithmetic):
    """Each answer token is the sum of two numbers of the prompt.

    "3 +5 +2 =" asks for 1 0, that is 3 + 5 and 5 + 2 modulo 7, where the chain of
    running sums has 1 3. Prompt, vocabulary and shape are those of the chain, but every
    token of the answer can be read from the prompt alone: given it, the tokens are
    independent.

    Args:
        arguments: of `Arithmetic`, without form and operators.
    Introduced in notebook 20.
    """

    def __init__(self, operations: int = 7, **arguments):
        super().__init__("chain", operations, operators="+", **arguments)

    def totals(self, problems: Int[Tensor, "B N+1"]) -> Int[Tensor, "B N"]:
        """The sum of each operation's number and the one before it."""
        numbers = self.effect[problems[:, 1:], 0]  # +k takes 0 to k
        numbers = torch.cat([problems[:, :1] - self.zero, numbers], dim=1)
        return (numbers[:, :-1] + numbers[:, 1:]) % self.modulus

    def grade(self, sequences: Int[Tensor, "B T"]) -> Bool[Tensor, " B"]:
        """True for rows whose whole answer is right."""
        solved = self._solved(self.problems(sequences), None).to(sequences.device)
        return (sequences == solved)[:, self.prompt_length :].all(1)
