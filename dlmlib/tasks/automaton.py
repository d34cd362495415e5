"""A finite weighted automaton: exact probabilities of word sequences of fixed length.

An arc leads from a state to a state, has a probability, and reads one word of a *class*
(singular nouns, say); a class is a distribution over words. If every sequence has at
most one accepting path, sampling, probabilities, entropy and every conditional given
some of the words follow from two recursions along the sequence, forward and backward.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from dlmlib.errors import check

IMPOSSIBLE = -1e4  # log-probability of a token that cannot be: softmax gives exactly 0
CHUNK = 1024  # rows that are scored together, to bound memory


@dataclass
class Walk:
    """Random sequences and the paths that wrote them.

    input_ids: [B, T] the words.
    states: [B, T] the state that each word was read from.
    classes: [B, T] the class that each word was drawn from.
    """

    input_ids: Int[Tensor, "B T"]
    states: Int[Tensor, "B T"]
    classes: Int[Tensor, "B T"]


class Automaton(nn.Module):
    """Paths from the first state to the last, over words 0..V-1, in float64.

    Sizes: A arcs, K states, C classes. Probabilities are not kept as logarithms: that
    of some twenty words is far above the smallest float64. Inside, rows come last,
    which keeps the sums over arcs contiguous.

    Args:
        source: [A] state that each arc leaves, in ascending order.
        target: [A] state that it enters.
        reads: [A] class of the word it reads.
        weight: [A] its probability given its source; sums to one per state.
        emission: [C, V] p(word | class).
        length: T, the length of every sequence.
    """

    def __init__(self, source, target, reads, weight, emission, length: int):
        super().__init__()
        self.length, self.num_states = length, max(*source, *target) + 1
        self.register_buffer("source", torch.tensor(source))
        self.register_buffer("target", torch.tensor(target))
        self.register_buffer("reads", torch.tensor(reads))
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float64))
        self.register_buffer("emission", emission.double())

    def likelihood(self, input_ids, wildcard: int) -> Float[Tensor, "T C B"]:
        """p(word at t | class), and 1 where the word is the wildcard."""
        seen = self.emission.T[input_ids.T]  # [T, B, C]
        hidden = input_ids.T[..., None] == wildcard
        return torch.where(hidden, 1.0, seen).transpose(1, 2).contiguous()

    def forward_mass(self, likelihood) -> Float[Tensor, "T+1 K B"]:
        """α_t(k) = p(first t words, state k), the forward algorithm."""
        alpha = [likelihood.new_zeros(self.num_states, likelihood.shape[2])]
        alpha[0][0] = 1.0
        for seen in likelihood:
            flow = alpha[-1][self.source] * self.weight[:, None] * seen[self.reads]
            alpha.append(_sum_by(self.target, flow, self.num_states))
        return torch.stack(alpha)

    def backward_mass(self, likelihood) -> Float[Tensor, "T+1 K B"]:
        """β_t(k) = p(words after the first t | state k), from the last word back."""
        beta = [likelihood.new_zeros(self.num_states, likelihood.shape[2])]
        beta[0][-1] = 1.0
        for seen in likelihood.flip(0):
            flow = beta[-1][self.target] * self.weight[:, None] * seen[self.reads]
            beta.append(_sum_by(self.source, flow, self.num_states))
        return torch.stack(beta).flip(0)

    def conditionals(self, input_ids, wildcard: int) -> Float[Tensor, "B T V"]:
        """p(x_t = v and all words but the t-th), not normalised over v.

        An arc at t carries α_t(source) · weight · β_{t+1}(target) whatever word it
        reads; its class then spreads this mass over the words.
        """
        likelihood = self.likelihood(input_ids, wildcard)
        alpha, beta = self.forward_mass(likelihood), self.backward_mass(likelihood)
        steps = []
        for before, after in zip(alpha[:-1], beta[1:], strict=True):
            flow = before[self.source] * self.weight[:, None] * after[self.target]
            steps.append(
                self.emission.T @ _sum_by(self.reads, flow, len(self.emission))
            )
        return torch.stack(steps).permute(2, 0, 1)

    def walk(self, n: int, generator: torch.Generator) -> Walk:
        """Draw n sequences: all rows take their t-th arc together.

        State k owns the stretch [k, k+1) of the running sum of arc weights, so k + u
        with u uniform falls on an arc of k with its probability; words likewise. u has
        24 bits, which keeps k + u exact and short of k + 1.
        """
        arcs, words = self.weight.cumsum(0), self.emission.flatten().cumsum(0)
        state, steps = torch.zeros(n, dtype=torch.long), []
        for _ in range(self.length):
            u, v = torch.rand(2, n, generator=generator).double()
            arc = torch.searchsorted(arcs, state + u, right=True)
            read = self.reads[arc]
            word = torch.searchsorted(words, read + v, right=True)
            steps.append((word % self.emission.shape[1], state, read))
            state = self.target[arc]
        return Walk(*(torch.stack(column, 1) for column in zip(*steps, strict=True)))

    def entropy(self) -> float:
        """H(k) = Σ_arcs p (-ln p + H(class) + H(target)), T times from H = 0 [nats]."""
        words = torch.special.entr(self.emission).sum(-1)
        remaining = self.weight.new_zeros(self.num_states)
        for _ in range(self.length):
            later = words[self.reads] + remaining[self.target]
            terms = torch.special.entr(self.weight) + self.weight * later
            remaining = _sum_by(self.source, terms, self.num_states)
        return remaining[0].item()

    def is_ambiguous(self) -> bool:
        """Whether two different paths read the same sequence.

        Two copies read the same words. `met[k, l]`: they can stand in k and l; `ends[k,
        l]`: both can still finish. Some sequence is ambiguous exactly if two different
        arcs that share a word lead from a `met` pair to an `ends` pair.
        """
        words = (self.emission[self.reads] > 0).float()  # [A, V]
        shared = words @ words.T > 0  # [A, A]

        def advance(pairs, here, there):
            flow = (pairs[here][:, here] & shared).float()
            moved = _sum_by(
                there, _sum_by(there, flow, self.num_states).T, self.num_states
            )
            return pairs | (moved.T > 0)

        met = torch.zeros(self.num_states, self.num_states, dtype=torch.bool)
        ends = met.clone()
        met[0, 0] = ends[-1, -1] = True
        for _ in range(self.length):
            met = advance(met, self.source, self.target)
            ends = advance(ends, self.target, self.source)
        source, target = self.source, self.target
        pairs = met[source][:, source] & ends[target][:, target] & shared
        return bool(pairs.fill_diagonal_(False).any())


class IdealDenoiser(nn.Module):
    """p(x_i | visible tokens) for every masked position at once, by forward-backward.

    Used like a network: `denoiser(input_ids).logits`. An impossible token gets the
    finite logit -10000, whose probability is exactly 0, so that entropies and guidance
    stay finite. If the visible tokens themselves are impossible, no conditional exists:
    the masked positions then get the grammar's marginal p(x_i). Float64, on the device
    that it is moved to. Introduced in notebook 03.

    Args:
        automaton: the compiled grammar.
        mask_token_id: the id that marks unknown tokens.
    """

    def __init__(self, automaton: Automaton, mask_token_id: int):
        super().__init__()
        self.automaton, self.mask_token_id = automaton, mask_token_id
        blank = torch.full((1, automaton.length), mask_token_id)
        self.register_buffer("marginal", automaton.conditionals(blank, mask_token_id))

    def forward(self, input_ids: Int[Tensor, "B T"]) -> MaskedLMOutput:
        """Exact conditionals.

        Args:
            input_ids: [B, T] with T the grammar's length.

        Returns:
            `.logits` [B, T, V] log-probabilities; one-hot at visible positions.

        Raises:
            ValueError: not [B, T], or ids outside the vocabulary.
        """
        check_ids(input_ids, self.automaton)
        parts = [
            self.automaton.conditionals(rows, self.mask_token_id)
            for rows in input_ids.split(CHUNK)
        ]
        joint = torch.cat(parts)
        total = joint.sum(-1, keepdim=True)
        p = torch.where(total > 0, joint / total, self.marginal)
        visible = nn.functional.one_hot(input_ids.long(), p.shape[-1]).to(p.dtype)
        p = torch.where((input_ids == self.mask_token_id)[..., None], p, visible)
        return MaskedLMOutput(logits=p.log().clamp_min(IMPOSSIBLE))


def check_ids(input_ids: Tensor, automaton: Automaton) -> None:
    """Refuse anything but integer [B, T] ids of the vocabulary."""
    shape, size = tuple(input_ids.shape), automaton.emission.shape[1]
    expected = f"shape [B, {automaton.length}]"
    fits = len(shape) == 2 and shape[1] == automaton.length
    check(fits, "input_ids.shape", shape, expected)
    integer = not (input_ids.is_floating_point() or input_ids.dtype == torch.bool)
    check(integer, "input_ids.dtype", input_ids.dtype, "integers")
    outside = input_ids[(input_ids < 0) | (input_ids >= size)]
    check(not len(outside), "input_ids", outside[:3].tolist(), f"ids in 0..{size - 1}")


def _sum_by(index: Int[Tensor, " A"], values: Tensor, size: int) -> Tensor:
    """Sum the rows of `values` that have the same index."""
    return values.new_zeros(size, *values.shape[1:]).index_add_(0, index, values)
