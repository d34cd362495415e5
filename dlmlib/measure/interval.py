"""A mean over samples and how far it can be trusted."""

import math
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from dlmlib.errors import check


def mean_interval(
    rows: Float[Tensor, " B"],
    level: float = 0.95,
    generator: torch.Generator | None = None,
    draws: int = 2000,
) -> tuple[float, float]:
    """Confidence interval of the mean of independent rows; nan rows are left out.

    Without a generator, the normal approximation: mean ± z s / sqrt(B). With one, the
    percentile bootstrap over resampled rows.

    Args:
        rows: one value a sample.
        level: coverage, in (0, 1).
        generator: source of the resamples.
        draws: number of resamples.
    Returns:
        (low, high); (nan, nan) below two rows.
    Raises:
        ValueError: a level outside (0, 1) or draws < 1.
    Introduced in notebook 11.
    """
    check(0 < level < 1, "level", level, "within (0, 1)")
    check(draws >= 1, "draws", draws, "an integer >= 1")
    rows = rows.detach().double().cpu()
    rows = rows[~rows.isnan()]
    if len(rows) < 2:
        return math.nan, math.nan
    if generator is None:
        half = NormalDist().inv_cdf((1 + level) / 2) * rows.std() / len(rows) ** 0.5
        return (rows.mean() - half).item(), (rows.mean() + half).item()
    chosen = torch.randint(len(rows), (draws, len(rows)), generator=generator)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()
    low, high = rows[chosen].mean(1).quantile(tails).tolist()
    return low, high
