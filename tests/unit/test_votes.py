"""Votes: enumeration of all outcomes, closed forms and simulation."""

from itertools import combinations, product
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from toys import gen

from dlmlib.measure.votes import (
    any_of_k,
    majority,
    majority_accuracy,
    vote_success,
)


def test_majority_by_hand():
    answers = torch.tensor(
        [[3, 5, 5, -1], [-1, -1, -1, 2], [7, 4, 4, 7], [-1, -1, -1, -1], [1, 2, 3, 4]]
    )
    assert majority(answers).tolist() == [5, 2, 7, -1, 1]
    truth = torch.tensor([5, 2, 4, 0, 9])
    assert majority_accuracy(answers, truth).tolist() == [1, 1, 0.5, 0, 0]
    assert majority_accuracy(answers, truth, guess=0.5)[3] == 0.5


def test_another_sign_for_abstaining():
    answers = torch.tensor([[0, 0, 0, 6, -1]])
    assert majority(answers, abstain=0).tolist() == [6]
    assert majority_accuracy(answers, torch.tensor([-1]), abstain=0).item() == 0.5


def test_random_ties_are_uniform():
    answers = torch.tensor([[7, 4, 4, 7, 9, 9, 1]]).expand(3000, -1)
    winners = majority(answers, gen(0))
    counts = [int((winners == word).sum()) for word in (4, 7, 9)]
    assert sum(counts) == 3000 and stats.chisquare(counts).pvalue > 1e-3


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=7), st.integers(0, 3))
def test_majority_is_the_mode(votes, truth):
    counts = {a: votes.count(a) for a in set(votes) - {-1}}
    best = {a for a, n in counts.items() if n == max(counts.values())}
    answers = torch.tensor([votes])
    for generator in (None, gen(1)):
        winner = majority(answers, generator).item()
        assert winner in best if best else winner == -1
    expected = (truth in best) / len(best) if best else 0.25
    found = majority_accuracy(answers, torch.tensor([truth]), guess=0.25)
    assert abs(found.item() - expected) < 1e-12


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_any_of_k_is_the_mean_over_subsets(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(combinations(correct, k))
    expected = sum(any(s) for s in subsets) / len(subsets)
    found = any_of_k(torch.tensor([correct]), k).item()
    assert abs(found - expected) < 1e-12


def test_any_of_k_does_not_overflow():
    correct = torch.zeros(1, 4000, dtype=torch.bool)
    correct[0, 0] = True
    assert abs(any_of_k(correct, 1000).item() - 0.25) < 1e-9
    assert any_of_k(~correct, 2000).item() == 1


@pytest.mark.parametrize("tie", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_vote_success_by_enumeration(k, tie):
    for right, wrong in [(0.6, 0.4), (0.3, 0.2), (0.5, 0.0), (0.0, 0.0), (0.0, 0.7)]:
        total = 0.0
        for votes in product((1, -1, 0), repeat=k):
            chance = 1.0
            for vote in votes:
                chance *= {1: right, -1: wrong, 0: 1 - right - wrong}[vote]
            lead = sum(votes)
            total += chance * (1.0 if lead > 0 else tie if lead == 0 else 0.0)
        found = vote_success(right, k, wrong, tie).item()
        assert abs(found - total) < 1e-12


def test_vote_success_closed_forms():
    p = torch.linspace(0, 1, 11)
    for k in (1, 2, 7, 64, 500):
        half = vote_success(torch.tensor(0.5), k).item()
        assert abs(half - 0.5) < 1e-9
        abstaining = vote_success(p, k, wrong=0.0)
        assert torch.allclose(abstaining, 1 - 0.5 * (1 - p.double()) ** k, atol=1e-9)
    condorcet = sum(comb(5, j) * 0.7**j * 0.3 ** (5 - j) for j in (3, 4, 5))
    assert abs(vote_success(0.7, 5).item() - condorcet) < 1e-12
    assert vote_success(0.51, 2001).item() > 0.8


def test_theory_and_votes_agree():
    """Simulated votes between two answers, through both functions."""
    q, k, problems = 0.2, 5, 20_000
    draw = torch.rand(problems, k, generator=gen(2))
    answers = torch.where(draw < q, 1, torch.where(draw < q + 0.1, 0, -1))
    truth = torch.ones(problems, dtype=torch.long)
    found = majority_accuracy(answers, truth, guess=0.5)
    error = found.std().item() / problems**0.5
    expected = vote_success(q, k, wrong=0.1).item()
    assert abs(found.mean().item() - expected) < 4 * error
    found = any_of_k(answers == 1, 3)
    error = found.std().item() / problems**0.5
    assert abs(found.mean().item() - (1 - (1 - q) ** 3)) < 4 * error


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: majority(torch.zeros(3).long()), "answers.shape=(3,)"),
        (lambda: any_of_k(torch.ones(1, 3).bool(), 4), "k=4"),
        (lambda: vote_success(0.7, 0), "k=0"),
        (lambda: vote_success(0.7, 3, wrong=0.4), "right, wrong=(0.7, 0.4)"),
        (lambda: vote_success(0.7, 3, tie=2), "tie=2"),
        (
            lambda: majority_accuracy(torch.zeros(2, 3).long(), torch.zeros(3).long()),
            "truth.shape=(3,)",
        ),
        (
            lambda: majority_accuracy(
                torch.zeros(1, 3).long(), torch.zeros(1).long(), guess=-1
            ),
            "guess=-1",
        ),
    ],
)
def test_wrong_input(call, name):
    with pytest.raises(ValueError) as error:
        call()
    assert name in str(error.value)
