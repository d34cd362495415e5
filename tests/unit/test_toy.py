"""The toy joint: every number against brute force over all strings."""

from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmlib.diffusion import exact_log_likelihood
from dlmlib.tasks.toy import Joint


def random_joint(seed: int, length: int = 3, letters: int = 3) -> Joint:
    generator = torch.Generator().manual_seed(seed)
    strings = torch.tensor(list(product(range(letters), repeat=length)))
    some = strings[torch.randperm(len(strings), generator=generator)[:7]]
    weights = torch.rand(len(some), generator=generator) + 0.05
    return Joint(some, weights, letters + 1, mask_token_id=letters)


def all_strings(joint: Joint) -> torch.Tensor:
    letters = range(joint.vocab_size - 1)
    return torch.tensor(list(product(letters, repeat=joint.length)))


def test_two_spellings():
    joint, tokenizer = Joint.of_words({"CLAUD": 1, "LLADA": 1})
    marginals = joint.conditionals(torch.full((1, 5), tokenizer.mask_token_id))[0]
    for column, letters in enumerate(["CL", "L", "A", "UD", "DA"]):
        expected = {tokenizer.convert_tokens_to_ids(letter) for letter in letters}
        assert set(marginals[column].nonzero().flatten().tolist()) == expected
    assert joint.entropy() == pytest.approx(0.6931471805599453)
    # Three columns differ, each worth one bit; the joint is worth one bit.
    assert joint.total_correlation() == pytest.approx(2 * 0.6931471805599453)
    divergence, off = joint.parallel_error([[0, 1, 2, 3, 4]])
    assert divergence == pytest.approx(joint.total_correlation())
    assert off == pytest.approx(1 - 2 / 8)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_conditionals_are_bayes(seed, data):
    joint = random_joint(seed)
    truth = joint.sequences[data.draw(st.integers(0, len(joint.sequences) - 1))]
    hidden = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    canvas = truth.masked_fill(hidden, joint.mask_token_id)
    got = joint.conditionals(canvas[None])[0]
    for column in range(3):
        for letter in range(joint.vocab_size):
            fits = (joint.sequences == canvas)[:, ~hidden].all(1)
            hit = fits & (joint.sequences[:, column] == letter)
            p = joint.probabilities
            assert got[column, letter].item() == pytest.approx(
                (p[hit].sum() / p[fits].sum()).item(), abs=1e-12
            )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_parallel_distribution(seed):
    joint = random_joint(seed)
    strings = all_strings(joint)
    for order in permutations(range(3)):
        single = joint.parallel_log_prob(strings, [[column] for column in order])
        assert torch.allclose(single.exp(), joint.log_prob(strings).exp(), atol=1e-12)
    pairs = [list(range(2)), [2]]
    for groups in ([[0, 1, 2]], pairs, [[2], [0, 1]]):
        q = joint.parallel_log_prob(strings, groups).exp()
        assert q.sum().item() == pytest.approx(1)
        divergence, off = joint.parallel_error(groups)
        on = joint.log_prob(strings) > -torch.inf
        assert off == pytest.approx(q[~on].sum().item(), abs=1e-12)
        assert divergence >= -1e-12
    assert joint.parallel_error([[0, 1, 2]])[0] == pytest.approx(
        joint.total_correlation()
    )


def test_exact_model_has_no_gap():
    joint = random_joint(3)
    for sequence, p in zip(joint.sequences, joint.probabilities, strict=True):
        log_p, bound = exact_log_likelihood(joint.denoiser(), sequence)
        assert log_p == pytest.approx(p.log().item())
        assert bound == pytest.approx(p.log().item())


def test_sample_frequencies():
    from scipy.stats import chisquare

    joint = random_joint(1)
    drawn = joint.sample(20000, torch.Generator().manual_seed(0))
    counts = (drawn[:, None] == joint.sequences).all(-1).sum(0)
    assert counts.sum() == 20000
    assert chisquare(counts, 20000 * joint.probabilities).pvalue > 1e-4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Joint.of_words({"AB": 1, "ABC": 1}), "words=.*one length"),
        (
            lambda: Joint(torch.tensor([[0], [0]]), torch.ones(2), 3, 2),
            "(?s)sequences=.*different",
        ),
        (
            lambda: Joint(torch.tensor([[0], [1]]), torch.tensor([1.0, 0]), 3, 2),
            "(?s)probabilities=.*positive",
        ),
        (
            lambda: Joint(torch.tensor([[5]]), torch.ones(1), 3, 2),
            "(?s)sequences=.*0 … 2",
        ),
        (
            lambda: random_joint(0).parallel_error([[0], [0, 1, 2]]),
            "groups=.*every column once",
        ),
    ],
)
def test_wrong_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
