"""SeqDep: enumerated joints, a Markov chain in closed form, and loops by hand."""

from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from torch import nn
from toys import MASK, full_joint, gen, strings, tiny_lm, watch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import ModelOutput

from dlmlib.measure.sequential_dependence import (
    equal_segments,
    masked_dependence,
    segments_after,
    sequential_dependence,
)
from dlmlib.tasks.toy import Joint

TINY = 1e-9


class Markov(nn.Module):
    """log p(next | this): a model whose SeqDep is a difference of two entries."""

    def __init__(self, seed=0, next_token=True):
        super().__init__()
        table = 1.5 * torch.randn(5, 5, generator=gen(seed)).double()
        self.table, self.next_token = table.log_softmax(-1), next_token

    def forward(self, input_ids):
        logits = self.table[input_ids]
        return ModelOutput(logits=logits if self.next_token else logits.roll(1, 1))


def tiny_causal(seed=0):
    """A random causal twin."""
    return tiny_lm(seed, attention="causal", shift_logits=True)


def tiny_gpt2():
    """A random GPT-2 of transformers."""
    config = GPT2Config(vocab_size=11, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).double().eval()


def by_hand(model, ids, cuts, next_token):
    """Eq. 4 with one forward for each token."""

    def log_p(context, tokens):
        total = 0.0
        for token in tokens:
            given = context if next_token else [*context, 0]  # any token to predict
            logits = model(torch.tensor([given])).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
            context = [*context, token]
        return total

    return [
        log_p(ids[:a], ids[a:b]) - log_p(ids[: cuts[0]], ids[a:b])
        for a, b in list(pairwise(cuts))[1:]
    ]


@pytest.mark.parametrize("next_token", [True, False])
def test_markov_chain_in_closed_form(next_token):
    """Only the first token of a segment sees another one."""
    model = Markov(next_token=next_token)
    rows = torch.randint(5, (6, 10), generator=gen(1))
    found = sequential_dependence(model, rows, [1, 4, 5, 9], next_token=next_token)
    for row, nats in zip(rows.tolist(), found.nats.tolist(), strict=True):
        for n, start in enumerate((4, 5)):
            first = row[start]
            expected = model.table[row[start - 1], first] - model.table[row[0], first]
            assert abs(nats[n] - expected.item()) < TINY
    assert found.tokens.tolist() == [[1, 4]] * 6
    assert torch.allclose(found.rows, found.nats.mean(1))
    assert abs(found.per_token - found.nats.sum().item() / 30) < TINY
    per_token = found.nats.mean(0) / torch.tensor([1.0, 4.0]).double()
    assert torch.allclose(found.by_segment_per_token, per_token)
    assert torch.allclose(found.by_segment, found.nats.mean(0))


@pytest.mark.parametrize("build", [tiny_causal, tiny_gpt2])
def test_against_a_loop_by_hand(build):
    """Own twin and a model of transformers, told apart by their configs."""
    model, cuts = build(), [2, 4, 5, 8]
    rows = torch.randint(10, (3, 9), generator=gen(2)).tolist()
    found = sequential_dependence(model, rows, cuts).nats
    for row, nats in zip(rows, found, strict=True):
        expected = by_hand(model, row, cuts, next_token=build is tiny_gpt2)
        assert torch.allclose(nats, torch.tensor(expected).double(), atol=TINY)


def test_ragged_rows_batches_and_streams():
    """Every row is measured alone, whatever it shares a forward with."""
    model = tiny_causal(3)
    rows = [torch.randint(10, (n,), generator=gen(n)).tolist() for n in (9, 4, 12, 2)]
    cuts = equal_segments(3, start=1)
    alone = [sequential_dependence(model, [row], cuts).nats[0] for row in rows]
    stream = Dataset.from_dict({"input_ids": rows}).to_iterable_dataset()
    for data, batch_size in ((rows, 1), (rows, 3), (stream, 100)):
        found = sequential_dependence(model, data, cuts, batch_size=batch_size)
        for nats, own in zip(found.nats, alone, strict=True):
            assert torch.allclose(nats[: len(own)], own, atol=TINY)
            assert nats[len(own) :].isnan().all()
    assert found.tokens.tolist() == [[3, 0], [0, 0], [3, 3], [0, 0]]
    assert found.rows.isnan().tolist() == [False, True, False, True]
    low, high = found.interval()
    assert low < found.mean < high


def test_one_forward_scores_many_rows():
    model = tiny_causal()
    calls = watch(model)
    rows = torch.randint(10, (8, 7), generator=gen(4))
    sequential_dependence(model, rows, [1, 3, 5, 7], batch_size=24)
    assert len(calls) == 1 and calls[0].shape == (24, 7)


def marginal(joint, columns, tokens):
    """p(x_columns = tokens) by enumeration."""
    same = (joint.sequences[:, columns] == torch.tensor(tokens)).all(1)
    return joint.probabilities[same].sum()


def test_masked_estimator_is_exact_on_a_joint():
    """The two terms are conditionals of the joint, at the segment's own place."""
    joint, cuts = full_joint(5, 6), [1, 2, 4, 6]
    rows = joint.sample(20, gen(6))
    found = masked_dependence(joint.denoiser(), rows, cuts)
    for row, nats in zip(rows.tolist(), found.nats, strict=True):
        for n, (a, b) in enumerate(list(pairwise(cuts))[1:]):
            x, own = [0], list(range(a, b))
            given, all_of = list(range(a)), list(range(b))

            def p(columns, row=row):
                return marginal(joint, columns, [row[c] for c in columns])

            context = p(all_of) / p(given)
            alone = p(x + own) / p(x)
            assert abs(nats[n].item() - (context / alone).log().item()) < 1e-9
    assert found.nats.abs().min() > 1e-4


def test_its_mean_is_the_conditional_mutual_information():
    joint = full_joint(7, 4)
    found = masked_dependence(joint.denoiser(), joint.sequences, [1, 2, 4])
    mean = (joint.probabilities * found.nats[:, 0]).sum()

    def entropy(columns):
        index = (joint.sequences[:, columns] * 3 ** torch.arange(len(columns))).sum(1)
        mass = torch.zeros(81).double().index_add(0, index, joint.probabilities)
        return torch.special.entr(mass).sum()

    whole = entropy([0, 1, 2, 3])
    information = entropy([0, 1]) + entropy([0, 2, 3]) - entropy([0]) - whole
    assert abs(mean - information) < 1e-9 and information > 0.01


def test_independent_segments_give_zero():
    """p(x) p(a | x) p(b | x): nothing to be gained from a."""
    words, p_x = strings(3), torch.tensor([0.2, 0.3, 0.5])
    emit = torch.rand(3, 3, generator=gen(8)).double().softmax(-1)
    x, a, b = words.T
    joint = Joint(words, p_x[x] * emit[x, a] * emit[x, b], 4, MASK)
    found = masked_dependence(joint.denoiser(), words, [1, 2, 3])
    assert found.nats.abs().max() < 1e-12
    assert abs(found.mean) < 1e-12


def test_only_earlier_segments_differ():
    """Same length, same place, later tokens hidden in both."""
    model = tiny_lm(9)
    calls = watch(model)
    row = torch.tensor([[1, 2, 3, 4, 5, 6]])
    masked_dependence(model, row, [1, 3, 5])
    assert len(calls) == 1
    m = model.config.mask_token_id
    assert calls[0].tolist() == [
        [1, 2, 3, m, m],
        [1, 2, 3, 4, m],
        [1, m, m, m, m],
        [1, m, m, 4, m],
    ]


def test_masked_batches_of_unequal_rows():
    model = tiny_lm(10)
    rows = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 8, 7, 6, 5, 4, 3]]
    cuts = equal_segments(2, start=1)
    together = masked_dependence(model, rows, cuts, batch_size=3)
    for row, nats in zip(rows, together.nats, strict=True):
        own = masked_dependence(model, [row], cuts).nats[0]
        assert torch.allclose(nats[: len(own)], own, atol=TINY)


def test_segmentations():
    assert equal_segments(3)(list(range(8))) == [1, 4, 7]
    assert equal_segments(2, start=0)([5, 6]) == [0, 2]
    assert equal_segments(2, start=4)([5, 6]) == [2]
    stop = segments_after(9, start=2)
    assert stop([9, 9, 1, 9, 2, 2, 9]) == [2, 4, 7]
    assert stop([9, 9, 1, 9, 2, 2]) == [2, 4, 6]
    assert stop([9, 9, 1]) == [2, 3] and stop([9]) == [1]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: sequential_dependence(m, [[1, 2, 3]], [0, 2, 3]), "segments=[0, 2"),
        (lambda m: sequential_dependence(m, [[1, 2, 3]], [1, 4]), "segments=[1, 4]"),
        (lambda m: sequential_dependence(m, [[1, 2, 3]], [2, 1]), "segments=[2, 1]"),
        (lambda m: sequential_dependence(m, [], [1, 2]), "data=[]"),
        (
            lambda m: sequential_dependence(m, [[1, 2, 3]], [1, 2, 3], batch_size=0),
            "batch_size",
        ),
        (lambda m: masked_dependence(Markov(), [[1, 2]], [1, 2]), "mask_token_id=None"),
        (lambda m: equal_segments(0), "length=0"),
        (lambda m: segments_after(1, start=-1), "start=-1"),
    ],
)
def test_wrong_input(call, name):
    with pytest.raises(ValueError) as error:
        call(tiny_causal())
    assert name in str(error.value)
