"""Markov chains and running sums: exact numbers by enumeration."""

from itertools import product

import pytest
import torch
from toys import gen, p_value

from dlmlib.measure.sequential_dependence import (
    masked_dependence,
    sequential_dependence,
)
from dlmlib.tasks.markov import MarkovChain
from dlmlib.tasks.sums import RunningSums
from dlmlib.tasks.toy import Joint

CHAIN = MarkovChain.random(3, 1.5, 4, seed=1)


def joint_of(chain):
    """The chain as a table over all rows."""
    letters = len(chain.transition)
    rows = torch.tensor(list(product(range(letters), repeat=chain.length)))
    p = torch.full((len(rows),), 1 / letters).double()
    for t in range(1, chain.length):
        p = p * chain.transition[rows[:, t - 1], rows[:, t]]
    vocabulary = len(chain.tokenizer)
    return Joint(rows + chain.first, p, vocabulary, chain.tokenizer.mask_token_id)


def test_the_denoiser_is_exact_on_every_pattern():
    joint = joint_of(CHAIN)
    ids = CHAIN.sample(16, gen(0)).repeat_interleave(16, 0)
    hidden = torch.tensor(list(product([False, True], repeat=4))).repeat(16, 1)
    ids = ids.masked_fill(hidden, CHAIN.tokenizer.mask_token_id)
    found = CHAIN.denoiser()(ids).logits.exp()
    assert torch.allclose(found, joint.conditionals(ids), atol=1e-12)


def test_samples_follow_the_chain():
    joint = joint_of(CHAIN)
    samples = CHAIN.sample(20_000, gen(1))
    assert p_value(samples, joint.sequences, joint.probabilities) > 1e-3
    assert (
        CHAIN.batch(2, gen(1))["maskable"].tolist() == [[False, True, True, True]] * 2
    )


@pytest.mark.parametrize("cuts", [[1, 2, 3, 4], [1, 3, 4], [2, 3, 4]])
def test_dependence_is_the_mean_of_the_masked_estimator(cuts):
    joint = joint_of(CHAIN)
    found = masked_dependence(CHAIN.denoiser(), joint.sequences, cuts)
    mean = joint.probabilities @ found.nats
    assert torch.allclose(mean, CHAIN.dependence(cuts), atol=1e-9)
    # Placed right after x, s_n also costs the divergence from its own place.
    scorer = sequential_dependence(
        CHAIN.scorer(), joint.sequences, cuts, next_token=False
    )
    assert (joint.probabilities @ scorer.nats >= mean - 1e-9).all()


def test_no_coupling_no_dependence():
    chain = MarkovChain.random(5, 0.0, 7)
    assert chain.dependence([1, 3, 5, 7]).abs().max() < 1e-12


@pytest.mark.parametrize(("streams", "stride"), [(1, 1), (1, 5), (4, 1), (8, 3)])
def test_running_sums_by_hand(streams, stride):
    task = RunningSums(8, 5, streams, stride)
    ids = task.sample(50, gen(2))
    assert task.grade(ids).all()
    for row in (ids - task.first).tolist():
        numbers, answer, total = row[1:9], row[9:], 0
        for term in range(8):
            column = stride * term % 8
            start = term % (8 // streams) == 0
            total = (numbers[column] + (0 if start else total)) % 5
            assert answer[column] == total
    wrong = ids.clone()
    wrong[:, 9] = task.first + (wrong[:, 9] - task.first + 1) % 5
    assert task.grade(wrong).sum(1).tolist() == [7] * 50


def test_training_batches_are_skewed_and_solved():
    """A share of zeros that is uniform on (0, 1), on top of the uniform digits."""
    task = RunningSums(8, 5, stride=3)
    batch = task.batch(4000, gen(3))
    ids, answer = batch["input_ids"], torch.arange(17) > 8
    assert task.grade(ids).all() and (batch["maskable"] == answer).all()
    zeros = (ids[:, 1:9] == task.first).double()
    assert abs(zeros.mean().item() - (0.5 + 0.5 / 5)) < 0.02
    assert zeros.mean(1).var().item() > 2 * 0.6 * 0.4 / 8  # shares differ by problem


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: RunningSums(8, streams=3), "streams=3"),
        (lambda: RunningSums(8, stride=4), "stride=4"),
        (lambda: RunningSums(modulus=1), "modulus=1"),
        (lambda: RunningSums().sample(0, gen()), "n=0"),
        (lambda: MarkovChain(torch.ones(2, 2), 4), "transition="),
        (lambda: MarkovChain(torch.eye(2)[:1], 4), "transition.shape"),
        (lambda: MarkovChain(torch.eye(2), 1), "length=1"),
        (lambda: CHAIN.sample(0, gen()), "n=0"),
    ],
)
def test_wrong_input(call, name):
    with pytest.raises(ValueError) as error:
        call()
    assert name in str(error.value)
