"""Joint distributions small enough to write down: every quantity is exact."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dlmlib.errors import check
from dlmlib.text import word_tokenizer


class Joint:
    """A distribution over M sequences of length L, each with its probability.

    Args:
        sequences: [M, L] token ids, all different.
        probabilities: [M], positive; they are normalised.
        vocab_size: V, larger than every id.
        mask_token_id: the [MASK] token, in no sequence.
    Raises:
        ValueError: for repeated sequences, non-positive probabilities or ids outside
            the vocabulary.
    Introduced in notebook 01.
    """

    def __init__(
        self,
        sequences: Int[Tensor, "M L"],
        probabilities: Float[Tensor, " M"],
        vocab_size: int,
        mask_token_id: int,
    ):
        check(
            len(sequences.unique(dim=0)) == len(sequences),
            "sequences",
            sequences,
            "all different",
        )
        check(
            probabilities.shape == (len(sequences),)
            and bool((probabilities > 0).all()),
            "probabilities",
            probabilities,
            f"{len(sequences)} positive numbers",
        )
        check(
            int(sequences.min()) >= 0 and int(sequences.max()) < vocab_size,
            "sequences",
            sequences,
            f"token ids in 0 … {vocab_size - 1}",
        )
        self.sequences = sequences
        self.probabilities = probabilities.double() / probabilities.double().sum()
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id

    @classmethod
    def of_words(cls, words: dict[str, float]) -> tuple["Joint", object]:
        """A joint over spellings, one token a letter, and its tokenizer.

        Raises:
            ValueError: if the words differ in length.
        """
        lengths = {len(word) for word in words}
        check(len(lengths) == 1, "words", list(words), "words of one length")
        tokenizer = word_tokenizer(sorted(set("".join(words))), separator="")
        sequences = torch.tensor([tokenizer.encode(word) for word in words])
        weights = torch.tensor(list(words.values()), dtype=torch.float64)
        joint = cls(sequences, weights, len(tokenizer), tokenizer.mask_token_id)
        return joint, tokenizer

    @property
    def length(self) -> int:
        """Tokens per sequence L."""
        return self.sequences.shape[1]

    def conditionals(self, input_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """p(x_i | visible tokens) at every position, summed over all sequences.

        A context that no sequence fits has no conditional; it gets the marginals, as a
        trained network would also answer something.
        """
        visible = (input_ids != self.mask_token_id)[:, None]  # [B, 1, L]
        agrees = (input_ids[:, None] == self.sequences) | ~visible  # [B, M, L]
        weight = agrees.all(-1).double() * self.probabilities  # [B, M]
        total = weight.sum(-1, keepdim=True)
        weight = torch.where(total > 0, weight / total, self.probabilities)
        onehot = nn.functional.one_hot(self.sequences, self.vocab_size).double()
        return torch.einsum("bm,mlv->blv", weight, onehot)

    def denoiser(self) -> "Table":
        """The ideal model: a module whose `.logits` are the exact conditionals."""
        return Table(self)

    def log_prob(self, input_ids: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """log p(x) in nats, -inf outside the support."""
        same = (input_ids[:, None] == self.sequences).all(-1)  # [B, M]
        return (same.double() @ self.probabilities).log()

    def sample(self, rows: int, generator=None) -> Int[Tensor, "B L"]:
        """Draw sequences."""
        chosen = torch.multinomial(
            self.probabilities, rows, replacement=True, generator=generator
        )
        return self.sequences[chosen]

    def entropy(self) -> float:
        """H(x) in nats."""
        return -(self.probabilities * self.probabilities.log()).sum().item()

    def total_correlation(self) -> float:
        """sum_i H(x_i) - H(x) in nats: the price of writing all positions at once.

        It is KL(p || prod_i p_i), the error of one parallel step. Introduced in
        notebook 01.
        """
        masks = self.sequences.new_full((1, self.length), self.mask_token_id)
        marginals = self.conditionals(masks)[0]  # [L, V]
        return torch.special.entr(marginals).sum().item() - self.entropy()

    def parallel_log_prob(
        self, input_ids: Int[Tensor, "B L"], groups: list[list[int]]
    ) -> Float[Tensor, " B"]:
        """log q(x) of a decoder that writes the groups in turn, each all at once.

        q(x) = prod_g prod_{i in g} p(x_i | x_{earlier groups}).

        Args:
            input_ids: sequences to score.
            groups: columns of each step; together they are all columns, once.
        Raises:
            ValueError: if a column is missing or repeated.
        Introduced in notebook 01.
        """
        columns = sorted(column for group in groups for column in group)
        check(
            columns == list(range(self.length)), "groups", groups, "every column once"
        )
        canvas = torch.full_like(input_ids, self.mask_token_id)
        total = torch.zeros(len(input_ids), dtype=torch.float64)
        for group in groups:
            p = self.conditionals(canvas)[:, group]  # [B, g, V]
            total += p.gather(-1, input_ids[:, group, None]).log().sum((1, 2))
            canvas[:, group] = input_ids[:, group]
        return total

    def parallel_error(self, groups: list[list[int]]) -> tuple[float, float]:
        """How far writing the groups is from p: (KL(p || q) in nats, mass off support).

        The second number is the chance that the decoder writes a sequence that does
        not exist. Introduced in notebook 01.
        """
        log_q = self.parallel_log_prob(self.sequences, groups)
        divergence = (self.probabilities * (self.probabilities.log() - log_q)).sum()
        return divergence.item(), 1 - log_q.exp().sum().item()


class Table(nn.Module):
    """A module whose logits are a joint's exact log conditionals."""

    def __init__(self, joint: Joint):
        super().__init__()
        self.joint, self.mask_token_id = joint, joint.mask_token_id

    def forward(self, input_ids: Int[Tensor, "B L"]) -> ModelOutput:
        """`.logits` [B, L, V], -inf where a token is impossible."""
        return ModelOutput(logits=self.joint.conditionals(input_ids).log())
