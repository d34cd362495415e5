"""Mean, aptitude and unreliability: by hand, against numpy, and their invariances."""

import numpy as np
import pytest
import torch
from toys import gen

from dlmlib.measure.reliability import reliability


def test_by_hand():
    """Eleven runs 0, 10, …, 100: the percentiles are runs themselves."""
    found = reliability(torch.arange(0, 101, 10.0)[None].expand(3, -1))
    assert found.mean == pytest.approx(50)
    assert found.aptitude == pytest.approx(90)
    assert found.unreliability == pytest.approx(80)


def test_is_numpys_percentile_averaged_over_instructions():
    scores = torch.rand(7, 10, generator=gen(0)).double() * 100
    found = reliability(scores)
    low, high = np.percentile(scores.numpy(), [10, 90], axis=1)
    assert found.mean == pytest.approx(scores.numpy().mean())
    assert found.aptitude == pytest.approx(high.mean())
    assert found.unreliability == pytest.approx((high - low).mean())


def test_hard_and_easy_instructions_are_not_unreliable():
    """Differences between instructions count for nothing, those between runs do."""
    steady = torch.tensor([[0.0], [100.0]]).expand(-1, 10)
    lucky = steady.T.reshape(2, 10)
    assert reliability(steady).unreliability == 0
    assert reliability(steady).aptitude == 50
    assert reliability(lucky).unreliability == 100
    assert reliability(lucky).aptitude == 100


def test_order_of_runs_and_units_do_not_matter():
    scores = torch.rand(5, 10, generator=gen(1)).double()
    plain = reliability(scores)
    moved = reliability(100 * scores[:, torch.randperm(10, generator=gen(2))] + 7)
    assert moved.mean == pytest.approx(100 * plain.mean + 7)
    assert moved.aptitude == pytest.approx(100 * plain.aptitude + 7)
    assert moved.unreliability == pytest.approx(100 * plain.unreliability)


def test_takes_grades():
    assert reliability(torch.ones(2, 10).bool()).aptitude == 1


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.ones(10), "scores.shape"),
        (torch.ones(3, 1), "scores.shape"),
        (torch.ones(0, 10), "scores.shape"),
        (torch.tensor([[1.0, torch.nan]]), "scores='nan'"),
    ],
)
def test_wrong_input_is_named(scores, message):
    with pytest.raises(ValueError, match=message):
        reliability(scores)
