"""What ARness a random order gets: exact expectations at given step sizes.

A random order writes, at each step, a uniformly random subset of the masks, as large as
the measured decode's step was. Only the sizes matter, so the numbers are exact sums.
"""

from functools import lru_cache
from math import comb, factorial, nan, prod


def global_chance(sizes: list[int], k: int, tie: str) -> float:
    """Expected global ARness@k of a random order.

    With R masks left and s to write, the i-th smallest of the s has rank X_i among the
    R. Left to right it counts if X_i < i + k, that is if at least i of the s lie in the
    first i + k - 1: a tail of the hypergeometric distribution. By confidence each of
    the s counts with chance k / (masks then left), as if written alone; as a set each
    lies in the leftmost s + k - 1 with chance (s + k - 1) / R.

    Args:
        sizes: tokens written at each step.
        k: how many of the leftmost masks count.
        tie: "left_to_right", "confidence" or "set".
    Introduced in notebook 11.
    """
    if tie == "confidence":
        sizes = [1] * sum(sizes)
    return _global_chance(tuple(sizes), k, tie)


@lru_cache
def _global_chance(sizes: tuple[int, ...], k: int, tie: str) -> float:
    total = left = sum(sizes)
    expected = 0.0
    for size in sizes:
        if tie == "set":
            expected += size * min(1.0, (size + k - 1) / left)
        else:
            expected += sum(
                at_least(i, left, min(left, i + k - 1), size)
                for i in range(1, size + 1)
            )
        left -= size
    return expected / total if total else nan


def at_least(i: int, population: int, marked: int, drawn: int) -> float:
    """Chance that `drawn` of `population` contain at least i of the `marked` ones."""
    short = sum(
        comb(marked, j) * comb(population - marked, drawn - j) for j in range(i)
    )
    return 1 - short / comb(population, drawn)


def local_chance(sizes: list[int], k: int, match: str, start: str) -> float:
    """Expected local ARness@k of a random order whose steps write left to right.

    The k + 1 commits u … u + k touch certain steps: the last tokens of the first one,
    all of those between, the first tokens of the last one. They are neighbours if the
    other tokens of the first step lie left of them and those of the last step right of
    them. Over all places this can happen in C(n - k, rest + 1) ways, rest the number of
    these others, out of the ways to choose the steps' positions.

    Args:
        sizes: tokens written at each step.
        k: how many commits before this one must be its left neighbours.
        match: "run" or "set": also in another order between the steps.
        start: "prompt" or "skip", as for `local_arness`.
    Introduced in notebook 11.
    """
    return _local_chance(tuple(sizes), k, match, start)


@lru_cache
def _local_chance(sizes: tuple[int, ...], k: int, match: str, start: str) -> float:
    n = sum(sizes)
    step_of = [step for step, size in enumerate(sizes) for _ in range(size)]
    inside = sum(
        chance_of_run(sizes, step_of[u : u + k + 1], match, comb_places=n - k)
        for u in range(n - k)
    )
    if start == "skip":
        return inside / (n - k) if n > k else nan
    # Commit p < k counts if it and all before it filled the first p + 1 positions.
    first = sum(
        chance_of_run(sizes, step_of[: p + 1], match, comb_places=None)
        for p in range(min(k, n))
    )
    return (inside + first) / n if n else nan


def chance_of_run(
    sizes: tuple[int, ...], steps: list[int], match: str, comb_places: int | None
) -> float:
    """Chance that consecutive commits at these steps fill neighbouring positions.

    Args:
        sizes: tokens written at each step of the whole decode.
        steps: step of each commit of the run, rising.
        match: "run": in rising order; "set": the last one rightmost, the others in any
            order that their steps allow.
        comb_places: number of places n - k where a run of k + 1 may begin; None if it
            begins at the first position.
    """
    n, touched = sum(sizes), sorted(set(steps))
    part = [steps.count(step) for step in touched]
    rest = sum(sizes[step] for step in touched) - len(steps)
    if comb_places is None:
        places = comb(n - len(steps), rest)
    else:
        places = comb(comb_places, rest + 1)
    ways = 1
    if match == "set":
        ways = factorial(len(steps) - 1)
        ways //= prod(factorial(p) for p in part[:-1]) * factorial(part[-1] - 1)
    chosen, left = 1, n
    for step in touched:
        chosen, left = chosen * comb(left, sizes[step]), left - sizes[step]
    return ways * places / chosen
