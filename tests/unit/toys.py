"""Small models whose answers are known or cheap, and a chi-square test."""

from itertools import product

import torch
from scipy import stats
from torch import nn
from transformers import BertConfig, BertForMaskedLM
from transformers.utils import ModelOutput

from dlmlib.model import DiffusionLM, DLMConfig
from dlmlib.tasks.toy import Joint

LETTERS = 3  # tokens 0 … 2 of the random joints
MASK = LETTERS  # their mask token


def gen(seed: int = 0) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def strings(length: int, letters: int = LETTERS) -> torch.Tensor:
    """Every string of this length, in lexical order [letters^length, length]."""
    return torch.tensor(list(product(range(letters), repeat=length)))


def full_joint(seed: int, length: int, letters: int = LETTERS, spread=1.5) -> Joint:
    """A random joint in which every string is possible."""
    words = strings(length, letters)
    weights = (spread * torch.randn(len(words), generator=gen(seed))).exp()
    return Joint(words, weights, letters + 1, mask_token_id=letters)


class RaggedTable(nn.Module):
    """Exact conditionals for rows of several lengths, one joint a length."""

    mask_token_id = MASK

    def __init__(self, seed: int, lengths):
        super().__init__()
        self.joints = {n: full_joint(seed + n, n) for n in lengths}

    def forward(self, input_ids, attention_mask=None):
        shape = (*input_ids.shape, LETTERS + 1)
        logits = torch.zeros(shape, dtype=torch.float64)
        for row, ids in enumerate(input_ids):
            real = slice(None) if attention_mask is None else attention_mask[row].bool()
            tokens = ids[real][None]
            joint = self.joints[tokens.shape[1]]
            logits[row, real] = joint.conditionals(tokens).log()[0]
        return ModelOutput(logits=logits)


class Votes(nn.Module):
    """The cheapest model with context: each token votes for every position.

    Votes depend on the distance from the row's end, so padding on the left changes
    nothing; the logits are float64 and have no ties.
    """

    mask_token_id = 10

    def __init__(self, seed: int = 0, longest: int = 32):
        super().__init__()
        shape = (longest, 11, 11)  # distance from the end, token, vote
        self.votes = 1.5 * torch.randn(shape, generator=gen(seed)).double()
        self.prior = torch.randn(longest, 11, generator=gen(seed + 1)).double()

    def forward(self, input_ids, attention_mask=None):
        places = torch.arange(input_ids.shape[1]).flip(0)
        votes = self.votes[places, input_ids]
        if attention_mask is not None:
            votes = votes * attention_mask[..., None]
        return ModelOutput(logits=votes.sum(1, keepdim=True) + self.prior[places])


def tiny_lm(seed: int = 0, **config) -> DiffusionLM:
    """A random DiffusionLM in float64, so that arg maxes have no ties."""
    shape = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1)
    shape |= dict(num_attention_heads=2, intermediate_size=16, mask_token_id=10)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DiffusionLM(DLMConfig(**shape | dict(initializer_range=0.7) | config))
    return model.double().eval()


def tiny_bert(seed: int = 0) -> BertForMaskedLM:
    """A random BERT of transformers: absolute positions, [MASK] = 10."""
    config = BertConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
    return model.double().eval()


def watch(model: nn.Module) -> list[torch.Tensor]:
    """A list that grows by the input_ids of every call."""
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    return seen


def p_value(samples: torch.Tensor, words: torch.Tensor, expected) -> float:
    """Chi-square test that the rows of `samples` come from `expected` over `words`.

    A sample outside `words` gives 0. Rare words are pooled into one cell.
    """
    same = (samples[:, None] == words).all(-1)
    if not bool(same.any(1).all()):
        return 0.0
    expected = expected.double() / expected.double().sum()
    count, mean = same.sum(0).double(), expected * len(samples)
    if bool((count[mean == 0] > 0).any()):
        return 0.0
    rare = mean < 10
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (count, mean)]
    if cells[1][-1] == 0:
        cells = [x[:-1] for x in cells]
    return float(stats.chisquare(*[x.numpy() for x in cells]).pvalue)


class StopsAfter:
    """An objective that interrupts the run after some updates."""

    def __init__(self, objective, calls: int):
        self.objective, self.calls = objective, calls

    def corrupt(self, batch, generator):
        return self.objective.corrupt(batch, generator)

    def __call__(self, model, batch):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.objective(model, batch)
