"""Quality against tokens per forward: the area by hand, and what it ignores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dlmlib as dlm
from dlmlib.measure.parallelism import aup, point, wilson

rates = st.lists(
    st.floats(0.5, 50), min_size=1, max_size=6, unique_by=lambda r: round(r, 3)
)


def test_one_point_is_a_rectangle():
    assert aup([2.5], [80.0]) == pytest.approx(200.0)


def test_three_points_by_hand():
    """W(77) = exp(-3 * 3/80), W(78) = exp(-3 * 2/80), W(80) = 1."""
    w77, w78 = math.exp(-0.1125), math.exp(-0.075)
    expected = 80 + 0.5 * 2 * (78 * w78 + 80) + 0.5 * 1 * (77 * w77 + 78 * w78)
    assert aup([1, 3, 4], [80, 78, 77]) == pytest.approx(expected)


def test_a_drop_of_more_than_five_points_does_not_count():
    kept = aup([1, 2], [80, 79])
    assert aup([1, 2, 9], [80, 79, 74.9]) == pytest.approx(kept)
    assert aup([1, 2, 9], [80, 79, 75.0]) > kept + 1
    assert aup([1, 2, 9], [80, 79, 74.9], drop=6) > kept + 1


def test_the_first_point_sets_the_level_even_when_it_is_not_the_best():
    """The second point is best; the first rectangle has no weight, as published."""
    w70 = math.exp(-3 * 10 / 80)
    expected = 70 + 0.5 * (80 + 70 * w70)
    assert aup([1, 2], [70, 80]) == pytest.approx(expected)


def test_a_dropped_point_in_the_middle_is_bridged():
    assert aup([1, 2, 3], [80, 10, 80]) == pytest.approx(aup([1, 3], [80, 80]))


@given(rates, st.floats(2, 100), st.floats(0, 9))
def test_a_constant_curve_is_accuracy_times_the_largest_rate(rho, y, penalty):
    area = aup(rho, [y] * len(rho), penalty=penalty)
    assert area == pytest.approx(y * max(rho))


@given(rates, st.randoms(use_true_random=False))
def test_the_order_of_the_points_does_not_matter(rho, random):
    y = [random.uniform(60, 100) for _ in rho]
    pairs = list(zip(rho, y, strict=True))
    random.shuffle(pairs)
    assert aup(*zip(*pairs, strict=True)) == pytest.approx(aup(rho, y))


@given(rates, st.floats(0.1, 8))
def test_twice_the_rate_is_twice_the_area(rho, factor):
    y = [90 - 3 * (k % 2) for k in range(len(rho))]
    area = aup([factor * r for r in rho], y)
    assert area == pytest.approx(factor * aup(rho, y))


def test_without_penalty_it_is_the_trapezoid():
    rho, y = [1, 2, 5], [80, 79, 76]
    trapezoid = 80 + 0.5 * (80 + 79) + 0.5 * 3 * (79 + 76)
    assert aup(rho, y, penalty=0) == pytest.approx(trapezoid)


def test_a_better_rival_lowers_the_area_and_a_worse_one_does_not():
    rho, y = [1, 2, 3], [70, 70, 70]
    weighed = 70 + 2 * 70 * math.exp(-3 * 20 / 90)
    assert aup(rho, y, best=90) == pytest.approx(weighed)
    assert aup(rho, y, best=50) == pytest.approx(210)  # W never exceeds 1


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        (([], []), {}, "tokens_per_forward"),
        (([1, 2], [80]), {}, "accuracy"),
        (([0, 2], [80, 80]), {}, "tokens_per_forward"),
        (([1, 2], [80, 101]), {"best": 90}, "accuracy"),
        (([1, 2], [0.8, 0.9]), {}, "best"),  # shares instead of per cent
        (([1, 2], [80, 80]), {"best": 120}, "best"),
        (([1, 2], [80, 80]), {"penalty": -1}, "penalty"),
        (([1, 2], [80, 80]), {"drop": -1}, "drop"),
    ],
)
def test_wrong_input_is_named(arguments, options, name):
    with pytest.raises(ValueError, match=rf"^{name}="):
        aup(*arguments, **options)


@given(st.integers(0, 40), st.integers(1, 40))
def test_wilson_ends_are_one_score_away(successes, trials):
    """At both ends |p̂ - p| = z sqrt(p (1 - p) / n), unless cut off at 0 or 1."""
    successes = min(successes, trials)
    share = successes / trials
    low, high = wilson(successes, trials)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            away = 1.96 * math.sqrt(end * (1 - end) / trials)
            assert abs(share - end) == pytest.approx(away, abs=1e-9)


def test_wilson_refuses_impossible_counts():
    for arguments, name in [((5, 4), "successes"), ((0, 0), "trials")]:
        with pytest.raises(ValueError, match=rf"^{name}="):
            wilson(*arguments)
    with pytest.raises(ValueError, match=r"^z="):
        wilson(1, 2, z=0)


def test_a_point_counts_all_tokens_and_all_forwards():
    """Rows of 12 tokens in 12, 6 and 3 forwards: 36 tokens in 21."""
    out = dlm.DecodeOutput(tokens_per_forward=torch.tensor([1.0, 2.0, 4.0]))
    found = point(out, torch.tensor([True, True, False]))
    assert found.tokens_per_forward == pytest.approx(36 / 21)
    assert found.accuracy == pytest.approx(200 / 3)
    assert (found.low, found.high) == pytest.approx(
        tuple(100 * end for end in wilson(2, 3))
    )


def test_a_point_wants_one_grade_a_row():
    out = dlm.DecodeOutput(tokens_per_forward=torch.ones(3))
    with pytest.raises(ValueError, match=r"^correct.shape="):
        point(out, torch.ones(2).bool())
