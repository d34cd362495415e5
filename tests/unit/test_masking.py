"""The forward process and its reverse: marginals, Bayes, and the chain between them."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare

from dlmlib.device import uniform
from dlmlib.diffusion import (
    Schedule,
    mask_tokens,
    named_schedule,
    posterior,
    unmask_tokens,
)

MASK = 9
NAMES = ("linear", "cosine", "polynomial")
schedules = st.one_of(
    st.sampled_from(NAMES).map(named_schedule),
    st.floats(0.3, 4).map(lambda power: named_schedule("polynomial", power)),
)
times = st.floats(0.01, 1)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def patterns(hidden: torch.Tensor) -> torch.Tensor:
    """How often each of the 2^L subsets of hidden positions occurred."""
    length = hidden.shape[1]
    index = (hidden.long() << torch.arange(length)).sum(1)
    return torch.bincount(index, minlength=2**length)


def independent(chance: float, length: int) -> torch.Tensor:
    """Probability of each subset when every position is in it with this chance."""
    size = torch.tensor([bin(s).count("1") for s in range(2**length)])
    return tensor(chance) ** size * tensor(1 - chance) ** (length - size)


def assert_distributed(counts: torch.Tensor, probabilities: torch.Tensor):
    expected = probabilities * counts.sum()
    assert (expected > 5).all()  # else the test is not valid
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4


# Schedules


@pytest.mark.parametrize("name", NAMES)
def test_schedules_fall_from_one_to_zero(name):
    schedule = named_schedule(name)
    assert schedule.name == name
    alpha = schedule.alpha(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert alpha[0] == 1 and alpha[-1].abs() < 1e-12
    assert (alpha.diff() < 0).all()


@given(schedule=schedules, t=st.floats(0.02, 0.98))
def test_slope_is_the_derivative(schedule, t):
    step = 1e-5
    ahead, behind = schedule.alpha(tensor(t + step)), schedule.alpha(tensor(t - step))
    torch.testing.assert_close(
        schedule.slope(tensor(t)), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7
    )


@given(schedule=schedules, t=times)
def test_weight_is_the_rate_of_hiding(schedule, t):
    """w = d log(1 - alpha) / dt, and 1/t for the linear schedule."""
    at = tensor(t).requires_grad_()
    (rate,) = torch.autograd.grad((1 - schedule.alpha(at)).log(), at)
    torch.testing.assert_close(schedule.weight(tensor(t)), rate, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        named_schedule("linear").weight(tensor(t)), 1 / tensor(t)
    )


def test_polynomial_of_power_one_is_linear():
    t = torch.linspace(0.01, 1, 50)
    one, linear = named_schedule("polynomial", 1.0), named_schedule("linear")
    torch.testing.assert_close(one.alpha(t), linear.alpha(t))
    torch.testing.assert_close(one.slope(t), linear.slope(t))


def test_own_schedule_passes_through():
    own = Schedule("own", lambda t: (1 - t) ** 3, lambda t: -3 * (1 - t) ** 2)
    assert named_schedule(own) is own


def test_unknown_schedules():
    with pytest.raises(ValueError, match=r"schedule='sine': expected one of .*cosine"):
        named_schedule("sine")
    for power in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"power={power}: expected > 0"):
            named_schedule("polynomial", power)


# q(x_t | x_0)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.85])
def test_every_pattern_has_its_probability(alpha):
    """Positions are hidden independently: all 2^L patterns, by chi-square."""
    clean = torch.tensor([[1, 2, 3, 4]]).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    noisy = mask_tokens(clean, torch.full((20_000,), alpha), MASK, generator=generator)
    hidden = noisy == MASK
    assert torch.equal(noisy[~hidden], clean[~hidden])
    assert_distributed(patterns(hidden), independent(1 - alpha, 4))


def test_each_row_has_its_own_time():
    clean = torch.ones(3, 4000, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    alpha = torch.tensor([0.1, 0.5, 0.9])
    visible = (mask_tokens(clean, alpha, MASK, generator=generator) == 1).float()
    spread = (alpha * (1 - alpha) / 4000).sqrt()
    assert ((visible.mean(1) - alpha).abs() < 4 * spread).all()


def test_ends_of_time_are_certain():
    clean = torch.arange(8).view(2, 4)
    noisy = mask_tokens(clean, torch.tensor([1.0, 0.0]), MASK)
    assert torch.equal(noisy[0], clean[0]) and (noisy[1] == MASK).all()


@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 1))
def test_unmaskable_tokens_stay(seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(MASK, (5, 6), generator=generator)
    maskable = torch.rand(5, 6, generator=generator) < 0.5
    noisy = mask_tokens(clean, torch.full((5,), alpha), MASK, maskable, generator)
    assert torch.equal(noisy[~maskable], clean[~maskable])
    assert ((noisy == clean) | (noisy == MASK)).all()
    everything = mask_tokens(clean, torch.zeros(5), MASK, maskable, generator)
    assert (everything[maskable] == MASK).all()


def test_same_seed_same_noise():
    clean, alpha = torch.ones(4, 50, dtype=torch.long), torch.full((4,), 0.5)
    before = torch.random.get_rng_state()
    drawn = [
        mask_tokens(clean, alpha, MASK, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), before)  # the global one rests


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_chances_outside_the_unit_interval(alpha):
    with pytest.raises(
        ValueError, match=r"visible=.*: expected chances within \[0, 1\]"
    ):
        mask_tokens(torch.ones(2, 3).long(), torch.tensor([0.5, alpha]), MASK)


def test_uniform_draws_are_uniform():
    drawn = uniform((20_000,), torch.Generator().manual_seed(0), "cpu")
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.bincount((drawn * 20).long(), minlength=20)
    assert_distributed(counts, torch.full((20,), 0.05, dtype=torch.float64))


# q(x_s | x_t, x_0)


def bayes(alpha_s, alpha_t):
    """q(x_s | x_t = MASK, x_0) from the joint of x_s and x_t: (stay, reveal).

    Forward from s to t a visible token survives with chance alpha_t / alpha_s and a
    hidden one stays hidden.
    """
    hidden_then_hidden = (1 - alpha_s) * 1.0
    visible_then_hidden = alpha_s * (1 - alpha_t / alpha_s)
    evidence = hidden_then_hidden + visible_then_hidden
    return hidden_then_hidden / evidence, visible_then_hidden / evidence


@given(schedule=schedules, s=times, t=times)
def test_posterior_is_bayes(schedule, s, t):
    assume(s < t)
    alpha_s, alpha_t = schedule.alpha(tensor(s)), schedule.alpha(tensor(t))
    stay, reveal = posterior(tensor(t), tensor(s), schedule)
    expected = bayes(alpha_s, alpha_t)
    torch.testing.assert_close(stay, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reveal, expected[1], rtol=1e-9, atol=1e-9)


@given(schedule=schedules, s=times, t=times)
def test_posterior_leads_back_to_the_marginal(schedule, s, t):
    """sum over x_t of q(x_s | x_t, x_0) q(x_t | x_0) = q(x_s | x_0)."""
    s, t = min(s, t), max(s, t)
    stay, reveal = posterior(tensor(t), tensor(s), schedule)
    alpha_s, alpha_t = schedule.alpha(tensor(s)), schedule.alpha(tensor(t))
    torch.testing.assert_close(stay + reveal, tensor(1.0))
    torch.testing.assert_close(alpha_t + (1 - alpha_t) * reveal, alpha_s)
    torch.testing.assert_close((1 - alpha_t) * stay, 1 - alpha_s)


def test_posterior_limits():
    for schedule in map(named_schedule, NAMES):
        t = tensor(0.3, 1.0)
        stay, reveal = posterior(t, torch.zeros_like(t), schedule)  # all is revealed
        torch.testing.assert_close(stay, tensor(0, 0))
        torch.testing.assert_close(reveal, tensor(1, 1))
        stay, reveal = posterior(t, t, schedule)  # no time, no change
        torch.testing.assert_close(stay, tensor(1, 1))
        torch.testing.assert_close(reveal, tensor(0, 0))
    stay, _ = posterior(tensor(0.8), tensor(0.2), named_schedule("linear"))
    torch.testing.assert_close(stay, tensor(0.25))  # s / t


@pytest.mark.parametrize(
    ("t", "s"), [(0.0, 0.0), (0.5, 0.6), (1.2, 0.5), (0.5, -0.1), (math.nan, 0.1)]
)
def test_times_out_of_order(t, s):
    with pytest.raises(ValueError, match=r"\(t, s\)=.*: expected 0 <= s <= t <= 1"):
        posterior(tensor(t), tensor(s), named_schedule("linear"))


@pytest.mark.parametrize("name", NAMES)
def test_chain_of_steps_samples_the_marginals(name):
    """From all masked at t = 1 down in four steps: q(x_s | x_0) at every stop."""
    schedule, rows = named_schedule(name), 20_000
    generator = torch.Generator().manual_seed(2)
    clean = torch.tensor([[1, 2, 3]]).expand(rows, -1)
    noisy = torch.full_like(clean, MASK)
    stops = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.0])
    for t, s in pairwise(stops):
        _, reveal = posterior(t, s, schedule)
        after = unmask_tokens(noisy, clean, reveal.expand(rows), MASK, generator)
        visible = noisy != MASK
        assert torch.equal(after[visible], noisy[visible])  # once shown, always shown
        assert ((after == clean) | (after == MASK)).all()
        noisy = after
        if s > 0:
            chance = 1 - schedule.alpha(s).item()
            assert_distributed(patterns(noisy == MASK), independent(chance, 3))
    assert torch.equal(noisy, clean)


def test_mask_then_unmask_is_masking_less():
    """x_t ~ q(. | x_0), then x_s ~ q(. | x_t, x_0): pairs as the joint says."""
    schedule, rows = named_schedule("cosine"), 20_000
    t, s = torch.tensor(0.7), torch.tensor(0.4)
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    generator = torch.Generator().manual_seed(3)
    clean = torch.ones(rows, 1, dtype=torch.long)
    late = mask_tokens(clean, alpha_t.expand(rows), MASK, generator=generator)
    _, reveal = posterior(t, s, schedule)
    early = unmask_tokens(late, clean, reveal.expand(rows), MASK, generator)
    pair = torch.bincount(2 * (late == MASK)[:, 0] + (early == MASK)[:, 0], minlength=4)
    assert pair[1] == 0  # visible late but hidden early is impossible
    joint = torch.stack([alpha_t, alpha_s - alpha_t, 1 - alpha_s]).double()
    assert_distributed(pair[[0, 2, 3]], joint)
