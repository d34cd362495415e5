"""Quality against tokens per forward, and the area under that curve (AUP)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from dlmlib.decoding import DecodeOutput
from dlmlib.errors import check


@dataclass(frozen=True)
class Point:
    """One setting of a decoder on one set of problems.

    Fields:
        tokens_per_forward: tokens written by all rows per forward they took part in.
        accuracy: share of correct rows, in per cent.
        low, high: Wilson's 95 % interval of the accuracy over problems, in per cent.
    Introduced in notebook 08.
    """

    tokens_per_forward: float
    accuracy: float
    low: float
    high: float


def point(out: DecodeOutput, correct: Bool[Tensor, " B"]) -> Point:
    """Grade a decode.

    Rows have answers of equal length, so their common tokens per forward is the
    harmonic mean: B L / Σ_b (L / r_b), with r_b the rate of row b.

    Args:
        out: what `decode` returned.
        correct: whether each row's answer is right.
    Raises:
        ValueError: for another number of rows, or none.
    Introduced in notebook 08.
    """
    rate = out.tokens_per_forward
    fits = correct.shape == rate.shape and len(rate) > 0
    check(
        fits, "correct.shape", tuple(correct.shape), f"{tuple(rate.shape)}, not empty"
    )
    low, high = wilson(int(correct.sum()), len(correct))
    return Point(
        tokens_per_forward=1 / rate.double().reciprocal().mean().item(),
        accuracy=100 * correct.double().mean().item(),
        low=100 * low,
        high=100 * high,
    )


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share: the p with |p̂ - p| <= z sqrt(p (1 - p) / n).

    Unlike p̂ ± z s it stays within [0, 1] and has a width at p̂ = 0 and 1.

    Args:
        successes: from 0 to `trials`.
        trials: n, at least 1.
        z: half-width in standard errors; 1.96 for 95 %.
    Raises:
        ValueError: for numbers outside these ranges.
    Source: Wilson (1927). Introduced in notebook 08.
    """
    check(trials >= 1, "trials", trials, ">= 1")
    check(0 <= successes <= trials, "successes", successes, f"within 0 … {trials}")
    check(z > 0, "z", z, "> 0")
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    spread = math.sqrt(weight * share * (1 - share) + weight * weight / 4)
    spread /= 1 + weight
    low = middle - spread if successes > 0 else 0.0  # exact at the ends
    return low, middle + spread if successes < trials else 1.0


def aup(
    tokens_per_forward: Sequence[float],
    accuracy: Sequence[float],
    *,
    best: float | None = None,
    penalty: float = 3.0,
    drop: float = 5.0,
) -> float:
    """Accuracy under parallelism: the area under accuracy against tokens per forward.

        AUP = ρ_1 y_1 + ½ Σ_{i>=2} (ρ_i - ρ_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})),
        W(y) = min(exp(-penalty (1 - y / best)), 1)

    The points are sorted by ρ; the first is the slowest. Points with
    y_i < y_1 - drop do not count. A decoder that keeps 100 % up to ρ scores 100 ρ.

    Args:
        tokens_per_forward: ρ of each setting, > 0, in any order.
        accuracy: y of each setting in per cent, not as a share: `drop` is in points.
        best: the best accuracy of all methods under comparison on this task, in per
            cent; None for this curve's own. Comparable scores need a common one.
        penalty: how fast accuracy below `best` loses its weight, >= 0.
        drop: points of accuracy that may be lost, >= 0.
    Returns:
        The area, in per cent x tokens per forward.
    Raises:
        ValueError: no points, lists of unequal length, or values out of range.
    Source: d3LLM (arXiv 2601.07568). Introduced in notebook 08.
    """
    rho, y = list(map(float, tokens_per_forward)), list(map(float, accuracy))
    check(len(rho) > 0, "tokens_per_forward", rho, "at least one setting")
    check(len(y) == len(rho), "accuracy", y, f"{len(rho)} values, one a setting")
    check(all(r > 0 for r in rho), "tokens_per_forward", rho, "numbers > 0")
    best = max(y) if best is None else best
    check(1 < best <= 100, "best", best, "per cent, above 1 and at most 100")
    check(all(0 <= v <= 100 for v in y), "accuracy", y, "per cent, within [0, 100]")
    check(penalty >= 0, "penalty", penalty, ">= 0")
    check(drop >= 0, "drop", drop, ">= 0 points")
    points = sorted(zip(rho, y, strict=True))
    first, start = points[0]
    kept = [pair for pair in points if pair[1] >= start - drop]
    area, (left, before) = first * start, kept[0]
    for right, value in kept[1:]:
        sides = value * weight(value, best, penalty)
        sides += before * weight(before, best, penalty)
        area += (right - left) * sides / 2
        left, before = right, value
    return area


def weight(accuracy: float, best: float, penalty: float) -> float:
    """W(y) = min(exp(-penalty (1 - y / best)), 1)."""
    return min(math.exp(-penalty * (1 - accuracy / best)), 1.0)
