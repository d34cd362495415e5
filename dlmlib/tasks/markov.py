"""Markov chains: text whose dependence is a number that can be turned."""

from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dlmlib.errors import check
from dlmlib.text import SPECIAL_TOKENS, word_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class MarkovChain:
    """x_0 uniform and given, then x_i ~ P[x_{i-1}]; every probability is exact.

    Args:
        transition: [M, M], rows sum to one.
        length: T, with x_0.
    Raises:
        ValueError: a matrix that is not square, has other row sums or negative entries,
            more than 26 letters, or length < 2.
    Introduced in notebook 11.
    """

    def __init__(self, transition: Float[Tensor, "M M"], length: int):
        p = transition.double()
        letters = len(p)
        square = p.dim() == 2 and p.shape[1] == letters and 2 <= letters <= len(LETTERS)
        check(square, "transition.shape", tuple(p.shape), "(M, M) with M in 2 … 26")
        sums = bool((p >= 0).all()) and bool(((p.sum(1) - 1).abs() < 1e-6).all())
        check(sums, "transition", transition, "rows of probabilities")
        check(length >= 2, "length", length, "an integer >= 2")
        self.transition, self.length = p, length
        self.first = len(SPECIAL_TOKENS)  # id of the letter a

    @classmethod
    def random(cls, letters: int, coupling: float, length: int, seed: int = 0):
        """P = softmax(coupling · normal noise): 0 for independent letters."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(letters, letters, generator=generator).double()
        return cls((coupling * noise).softmax(-1), length)

    @cached_property
    def tokenizer(self):
        """Letters as words."""
        return word_tokenizer(list(LETTERS[: len(self.transition)]))

    def batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """n fresh rows: input_ids [n, T], and maskable [n, T], False on x_0."""
        maskable = torch.arange(self.length) > 0
        return {
            "input_ids": self.sample(n, generator),
            "maskable": maskable.expand(n, -1),
        }

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n T"]:
        """Draw n rows."""
        check(n >= 1, "n", n, "an integer >= 1")
        letters = len(self.transition)
        rows = [torch.randint(letters, (n,), generator=generator)]
        for _ in range(self.length - 1):
            p = self.transition[rows[-1]]
            rows.append(torch.multinomial(p, 1, generator=generator)[:, 0])
        return torch.stack(rows, 1) + self.first

    def dependence(self, cuts: list[int]) -> Float[Tensor, " N-1"]:
        """I(s_n; s_<n | x) in nats for n = 2 … N, x being all before the first cut.

        Only the first letter of a segment depends on earlier ones: with a its column
        and c the last column of x it is H(x_a | x_c) - H(x_a | x_{a-1}).
        """
        p, start = self.transition, cuts[0] - 1
        at = torch.full((len(p),), 1 / len(p)).double()
        here = at @ torch.linalg.matrix_power(p, start)  # of the last letter of x
        row_entropy = torch.special.entr(p).sum(1)
        nats = []
        for a in cuts[1:-1]:
            far = torch.linalg.matrix_power(p, a - start)
            before = here @ torch.linalg.matrix_power(p, a - 1 - start)
            nats.append(here @ torch.special.entr(far).sum(1) - before @ row_entropy)
        return torch.stack(nats)

    def denoiser(self) -> "ChainDenoiser":
        """The ideal masked diffusion model of this chain."""
        return ChainDenoiser(self)

    def scorer(self) -> "ChainScorer":
        """The ideal autoregressive model: logits[:, i] are about letter i."""
        return ChainScorer(self)


class ChainDenoiser(nn.Module):
    """p(x_i | visible letters) by the forward and backward recursions."""

    def __init__(self, chain: MarkovChain):
        super().__init__()
        self.chain = chain
        self.mask_token_id = chain.tokenizer.mask_token_id

    def forward(self, input_ids: Int[Tensor, "B T"]) -> ModelOutput:
        """`.logits` [B, T, V], -inf for what is impossible."""
        p, first = self.chain.transition, self.chain.first
        letters, length = len(p), input_ids.shape[1]
        fits = torch.eye(letters).double()[(input_ids - first).clamp_min(0)]
        fits = fits.masked_fill((input_ids == self.mask_token_id)[..., None], 1.0)
        left, right = [fits[:, 0]], [torch.ones_like(fits[:, 0])]
        for t in range(1, length):
            left.append(normed(left[-1]) @ p * fits[:, t])
            right.append(normed(right[-1] * fits[:, length - t]) @ p.T)
        posterior = normed(torch.stack(left, 1) * torch.stack(right[::-1], 1))
        return ModelOutput(logits=nn.functional.pad(posterior, (first, 0)).log())


class ChainScorer(nn.Module):
    """log P[x_{i-1}, x_i] as the logits of a causal model."""

    def __init__(self, chain: MarkovChain):
        super().__init__()
        log_p = chain.transition.log()
        self.table = nn.functional.pad(log_p, (chain.first, 0), value=-torch.inf)
        self.first = chain.first

    def forward(self, input_ids: Int[Tensor, "B T"]) -> ModelOutput:
        """`.logits` [B, T, V]; those of the first column mean nothing."""
        before = input_ids.roll(1, 1)
        return ModelOutput(logits=self.table[(before - self.first).clamp_min(0)])


def normed(values: Float[Tensor, "*B M"]) -> Float[Tensor, "*B M"]:
    """Scaled to sum to one."""
    return values / values.sum(-1, keepdim=True)
