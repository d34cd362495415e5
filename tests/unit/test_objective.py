"""The objective: unbiased by enumeration, and a bound that exact models attain."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny_model
from transformers.utils import ModelOutput

from dlmlib.diffusion import (
    NELBO,
    Schedule,
    exact_log_likelihood,
    named_schedule,
)
from dlmlib.diffusion.objective import TIMES
from dlmlib.model import DiffusionLM
from dlmlib.tasks.toy import Joint

MASK, LENGTH = 5, 4
SCHEDULES = ("linear", "cosine", "polynomial")
WORD = torch.tensor([3, 0, 4, 1])


@pytest.fixture(scope="module")
def model() -> DiffusionLM:
    """A random network over five letters, far from uniform."""
    return tiny_model(
        vocab_size=MASK + 1,
        mask_token_id=MASK,
        hidden_size=16,
        num_hidden_layers=1,
        initializer_range=0.6,
    )


@pytest.fixture(scope="module")
def joint() -> Joint:
    """Nine words of three letters with random chances."""
    generator = torch.Generator().manual_seed(0)
    words = torch.tensor(list(product(range(3), repeat=3)))
    words = words[torch.randperm(len(words), generator=generator)[:9]]
    return Joint(words, torch.rand(9, generator=generator) + 0.1, 4, mask_token_id=3)


@torch.no_grad()
def costs(model, word=WORD, mask=MASK):
    """For all 2^L hidden sets: their size, and the nats of writing them at once."""
    hidden = torch.tensor(list(product([False, True], repeat=len(word))))
    logits = model(word.expand(len(hidden), -1).masked_fill(hidden, mask)).logits
    nats = -logits.double().log_softmax(-1)[..., torch.arange(len(word)), word]
    return hidden.sum(1).double(), nats.masked_fill(~hidden, 0).sum(1)


def integral(model, schedule, eps=0.0, word=WORD):
    """int_eps^1 w(t) E[cost of the hidden set] dt, by Gauss-Legendre quadrature."""
    sizes, nats = costs(model, word)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t = torch.tensor(eps + (1 - eps) * (nodes + 1) / 2)
    alpha = schedule.alpha(t)[:, None]
    chances = (1 - alpha) ** sizes * alpha ** (len(word) - sizes)
    values = schedule.weight(t) * (chances @ nats)
    return (values @ torch.tensor(weights)).item() * (1 - eps) / 2


@torch.no_grad()
def batch_means(model, objective, batches, rows, seed=0, ids=WORD):
    """Mean loss of each of many batches of `rows` copies, in one forward."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"input_ids": ids.expand(rows, -1)}
    drawn = [objective.corrupt(batch, generator) for _ in range(batches)]
    noised = {key: torch.cat([d[key] for d in drawn]) for key in drawn[0]}
    return objective(model, noised).double().view(batches, rows).mean(1)


# The number that is estimated


@pytest.mark.parametrize("schedule", [*map(named_schedule, SCHEDULES)], ids=SCHEDULES)
def test_the_bound_does_not_depend_on_the_schedule(model, schedule):
    """The integral over t equals the sum over orders, whatever alpha is."""
    _, bound = exact_log_likelihood(model, WORD)
    assert math.isclose(integral(model, schedule), -bound, rel_tol=1e-6)


ESTIMATORS = [
    *product(("iid", "low_discrepancy"), SCHEDULES),
    ("l_of_L", "linear"),  # which needs no schedule
]


@pytest.mark.parametrize(("times", "schedule"), ESTIMATORS)
def test_unbiased(model, times, schedule):
    """Within 4 standard errors of the enumerated value, batches of 8 dependent rows.

    Times start at eps, so the first share of the integral is left out; l-of-L has no
    times and is exact.
    """
    objective = NELBO(MASK, schedule, times)
    eps = 0.0 if times == "l_of_L" else objective.eps
    exact = integral(model, named_schedule(schedule), eps)
    means = batch_means(model, objective, batches=2500, rows=8)
    error = means.std() / len(means) ** 0.5
    assert error < 0.05 * exact  # else the test would pass for anything
    assert abs(means.mean() - exact) < 4 * error


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_what_eps_leaves_out(model, eps):
    """A share of the order of eps (1.3 eps here) is missing, and nothing else."""
    linear = named_schedule("linear")
    whole, rest = integral(model, linear), integral(model, linear, eps)
    assert 0 < 1 - rest / whole < 1.5 * eps
    means = batch_means(model, NELBO(MASK, eps=eps), batches=2500, rows=8)
    assert abs(means.mean() - rest) < 4 * means.std() / len(means) ** 0.5


def variance(model, times, seed, schedule="linear", word=WORD):
    """Of the mean over a batch of 8, measured over many batches."""
    objective = NELBO(MASK, schedule, times)
    return batch_means(model, objective, 600, 8, seed, word).var()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counting_tokens_lowers_the_variance(model, seed):
    """l-of-L has no 1/t tail: a tenth of the variance of independent times here."""
    independent = variance(model, "iid", seed)
    assert variance(model, "l_of_L", seed) < 0.5 * independent


def flat(input_ids):
    """Every letter and [MASK] equally likely: each hidden token costs log V."""
    return ModelOutput(logits=torch.zeros(*input_ids.shape, MASK + 1))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_spread_times_lower_the_variance(seed):
    """Where the mean loss depends on t, as it does for the cosine schedule.

    Evenly spaced times remove the variance between times, not that within one. Under
    the linear schedule the mean of a flat model is L log V at every t, so there is none
    to remove, and measured ratios scatter around 1 (as they do for the random model).
    """
    word = torch.arange(64) % MASK
    independent = variance(flat, "iid", seed, "cosine", word)
    spread = variance(flat, "low_discrepancy", seed, "cosine", word)
    assert spread < 0.5 * independent


def test_counting_tokens_of_a_flat_model_has_no_variance():
    """L / l times l log V is L log V, in every sample."""
    means = batch_means(flat, NELBO(MASK, times="l_of_L"), 50, 8)
    exact = torch.full_like(means, LENGTH * math.log(MASK + 1))
    torch.testing.assert_close(means, exact, rtol=1e-6, atol=0)


def test_exact_model_attains_its_likelihood(joint):
    """A random model's bound is loose; the exact conditionals' is the log-likelihood.

    Every order then gives a word the same probability, so l-of-L of one row, averaged,
    is -log p with no gap.
    """
    exact = joint.denoiser()
    for word in joint.sequences[:4]:
        nll = -joint.log_prob(word[None]).item()
        means = batch_means(exact, NELBO(3, times="l_of_L"), 600, 6, ids=word)
        assert abs(means.mean() - nll) < 4 * means.std() / 600**0.5 + 1e-6
        likelihood, bound = exact_log_likelihood(exact, word)
        assert math.isclose(likelihood, -nll, rel_tol=1e-5)
        assert math.isclose(bound, -nll, rel_tol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_bound_is_above_the_likelihood(seed):
    other = tiny_model(seed, vocab_size=MASK + 1, mask_token_id=MASK, hidden_size=8)
    likelihood, bound = exact_log_likelihood(
        other, random_ids(1, LENGTH, seed, MASK)[0]
    )
    assert bound < likelihood < 0


# Corruption


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    times=st.sampled_from(TIMES),
    schedule=st.sampled_from(SCHEDULES),
)
def test_only_maskable_tokens_are_hidden(seed, times, schedule):
    """Prompt and padding stay; tokens are counted; weights are what they should be."""
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(6, 9, seed)
    maskable = torch.rand(ids.shape, generator=generator) < 0.6
    padding = torch.rand(ids.shape, generator=generator) < 0.8
    objective = NELBO(12, schedule, times)
    noised = objective.corrupt(
        {"input_ids": ids, "maskable": maskable, "attention_mask": padding.long()},
        generator,
    )
    free = maskable & padding
    hidden = noised["noisy_ids"] == 12
    assert torch.equal(noised["tokens"], free.sum(1))
    assert torch.equal(noised["noisy_ids"][~hidden], ids[~hidden])
    assert not (hidden & ~free).any()
    assert torch.equal(noised["input_ids"], ids)
    assert (noised["weight"] >= 0).all() and noised["weight"].isfinite().all()
    if times == "l_of_L":
        count, tokens = hidden.sum(1), free.sum(1)
        assert ((count >= 1) | (tokens == 0)).all()
        some = tokens > 0
        expected = tokens[some] / count[some]
        torch.testing.assert_close(noised["weight"][some], expected)


def test_l_of_l_hides_every_subset_of_a_size_equally():
    """Sizes uniform in 1 … L, then all subsets of that size alike."""
    objective = NELBO(MASK, times="l_of_L")
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": WORD.expand(24_000, -1)}
    hidden = objective.corrupt(batch, generator)["noisy_ids"] == MASK
    sizes = torch.bincount(hidden.sum(1), minlength=LENGTH + 1)
    assert sizes.tolist() == [0, 6000, 6000, 6000, 6000]  # evenly spaced, so exact
    for size in range(1, LENGTH):
        chosen = hidden[hidden.sum(1) == size].long() << torch.arange(LENGTH)
        counts = torch.bincount(chosen.sum(1))
        counts = counts[counts > 0].double()
        assert len(counts) == math.comb(LENGTH, size)
        expected = counts.sum() / len(counts)
        # Mean and spread of chi-square with k - 1 degrees of freedom.
        freedom = len(counts) - 1
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_times_are_evenly_spaced(rows):
    objective = NELBO(MASK, times="low_discrepancy")
    generator = torch.Generator().manual_seed(0)
    shifts = []
    for _ in range(200):
        spread = objective.spread(rows, generator, "cpu").sort().values
        assert spread.min() >= 0 and spread.max() < 1
        strata = (spread * rows - spread[0] * rows).round(decimals=3)
        assert torch.equal(strata, torch.arange(rows).float())
        shifts.append(spread[0] * rows)
    shifts = torch.stack(shifts)
    assert 0.4 < shifts.mean() < 0.6 and shifts.std() > 0.25  # uniform within a stratum


def test_same_seed_same_corruption():
    batch = {"input_ids": random_ids(4, 30)}
    for times in TIMES:
        objective = NELBO(12, times=times)
        drawn = [
            objective.corrupt(batch, torch.Generator().manual_seed(seed))
            for seed in (0, 0, 1)
        ]
        for key in ("noisy_ids", "weight"):
            assert torch.equal(drawn[0][key], drawn[1][key])
            assert not torch.equal(drawn[0][key], drawn[2][key])


def test_steep_schedules_stay_finite(model):
    """1 - t^4 is 1 in float32 for small t; nothing is hidden then, the loss is 0."""
    objective = NELBO(MASK, named_schedule("polynomial", 4.0), times="low_discrepancy")
    generator = torch.Generator().manual_seed(0)
    noised = objective.corrupt({"input_ids": WORD.expand(500, -1)}, generator)
    assert objective(model, noised).isfinite().all()


# The loss of a corrupted batch


def corrupted(seed=0, rows=6, columns=8, times="low_discrepancy"):
    objective = NELBO(12, times=times)
    ids = random_ids(rows, columns, seed)
    maskable = torch.arange(columns) >= torch.arange(rows)[:, None] % 4
    generator = torch.Generator().manual_seed(seed)
    batch = {"input_ids": ids, "maskable": maskable}
    return objective, objective.corrupt(batch, generator)


@pytest.mark.parametrize("shift", [False, True])
def test_value_is_the_weighted_cross_entropy(shift):
    model = tiny_model(shift_logits=shift)
    objective, noised = corrupted()
    ours = objective(model, noised)
    log_p = model(noised["noisy_ids"]).logits.log_softmax(-1)
    for row in range(6):
        nats = 0.0
        for column in range(8):
            if noised["noisy_ids"][row, column] == 12:
                nats -= log_p[row, column, noised["input_ids"][row, column]]
        expected = noised["weight"][row] * nats
        torch.testing.assert_close(ours[row], torch.as_tensor(expected))


def test_half_a_batch_is_half_the_result():
    """So two processes, each with its rows, have the loss of one."""
    model = tiny_model()
    objective, noised = corrupted()
    whole = objective(model, noised)
    for part in (slice(0, 2), slice(2, 6), slice(3, 4)):
        rows = {key: value[part] for key, value in noised.items()}
        torch.testing.assert_close(objective(model, rows), whole[part])


def test_rows_do_not_depend_on_their_neighbours():
    model = tiny_model()
    objective, noised = corrupted()
    before = objective(model, noised)
    other = {key: value.clone() for key, value in noised.items()}
    other["input_ids"][1:] = (other["input_ids"][1:] + 1) % 12
    other["noisy_ids"][1:] = 12
    other["weight"][1:] = 7.0
    after = objective(model, other)
    torch.testing.assert_close(after[0], before[0])
    assert (after[1:] != before[1:]).all()


def test_padded_rows_equal_rows_alone():
    model = tiny_model()
    objective = NELBO(12)
    clean = random_ids(1, 6)
    noisy = clean.clone()
    noisy[0, [1, 4]] = 12
    alone = {"input_ids": clean, "noisy_ids": noisy, "weight": torch.tensor([2.0])}
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([pad, clean], 1),
        "noisy_ids": torch.cat([pad, noisy], 1),
        "attention_mask": torch.arange(9)[None] >= 3,
        "weight": torch.tensor([2.0]),
    }
    torch.testing.assert_close(objective(model, padded), objective(model, alone))


def test_gradient_comes_from_hidden_positions_only(model):
    """The logits' gradient is weight x (softmax - one-hot) there, and 0 elsewhere."""
    objective = NELBO(MASK)
    ids = random_ids(3, LENGTH, below=MASK)
    generator = torch.Generator().manual_seed(5)
    noised = objective.corrupt({"input_ids": ids}, generator)
    kept = []

    def table(input_ids):
        logits = model(input_ids).logits.detach().requires_grad_()
        kept.append(logits)
        return ModelOutput(logits=logits)

    objective(table, noised).sum().backward()
    (logits,) = kept
    hidden = noised["noisy_ids"] != ids
    assert hidden.any() and not hidden.all()
    onehot = torch.nn.functional.one_hot(ids, MASK + 1)
    slope = (logits.detach().softmax(-1) - onehot) * noised["weight"][:, None, None]
    expected = slope.masked_fill(~hidden[..., None], 0.0)
    torch.testing.assert_close(logits.grad, expected)


def test_nothing_hidden_costs_nothing():
    """A row without maskable tokens has loss 0, and a gradient that is finite."""
    model = tiny_model()
    ids = random_ids(2, 5)
    maskable = torch.tensor([[False] * 5, [True] * 5])
    for times in TIMES:
        objective = NELBO(12, times=times)
        generator = torch.Generator().manual_seed(0)
        noised = objective.corrupt({"input_ids": ids, "maskable": maskable}, generator)
        nats = objective(model, noised)
        assert nats[0] == 0 and nats.isfinite().all()
        assert noised["tokens"].tolist() == [0, 5]
        alone = {key: value[:1] for key, value in noised.items()}
        assert objective(model, alone).item() == 0


def test_half_precision_is_summed_in_full():
    """bfloat16 logits, float32 nats."""
    objective, noised = corrupted()
    nats = objective(tiny_model().to(torch.bfloat16), noised)
    assert nats.dtype == torch.float32
    reference = objective(tiny_model(), noised)
    assert (nats - reference).norm() < 0.1 * reference.norm()


# Wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": "uniform"}, r"times='uniform': expected one of .*low_discrepancy"),
        ({"schedule": "sine"}, r"schedule='sine': expected one of .*linear"),
        ({"eps": 0.0}, r"eps=0.0: expected within \(0, 1\)"),
        ({"eps": 1.0}, r"eps=1.0: expected within \(0, 1\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        NELBO(MASK, **options)


def test_own_schedule(model):
    """Any alpha from 1 to 0 gives the same bound."""
    cubic = Schedule("cubic", lambda t: (1 - t) ** 3, lambda t: -3 * (1 - t) ** 2)
    means = batch_means(model, NELBO(MASK, cubic), batches=2000, rows=8)
    exact = integral(model, cubic, eps=1e-3)
    assert abs(means.mean() - exact) < 4 * means.std() / len(means) ** 0.5
