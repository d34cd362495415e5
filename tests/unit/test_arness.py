"""ARness: the papers' definitions, brute force over orders, and invariances."""

from itertools import permutations
from math import isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import Votes, gen

import dlmlib as dlm
from dlmlib.measure.arness import ARness, arness, local_arness
from dlmlib.measure.interval import mean_interval

MASK = Votes.mask_token_id


def steps_of(order, sizes=None):
    """commit_step [1, T] of positions written in this order, so many at a time."""
    sizes = sizes or [1] * len(order)
    step = torch.full((len(order),), -1)
    when = [s for s, size in enumerate(sizes) for _ in range(size)]
    step[torch.tensor(order)] = torch.tensor(when)
    return step[None]


def global_by_hand(order, k):
    """The paper's sum over commits, literally."""
    masked, hits = set(order), 0
    for p in order:
        hits += p in sorted(masked)[:k]
        masked.remove(p)
    return hits / len(order)


def local_by_hand(order, k, match, start):
    """The paper's sum over commits, literally; the prompt is … -2, -1."""
    history = [*range(-k, 0), *order]
    hits = []
    for t, p in enumerate(order, start=k):
        last, wanted = history[t - k : t], list(range(p - k, p))
        hits.append(set(last) == set(wanted) if match == "set" else last == wanted)
    hits = hits if start == "prompt" else hits[k:]
    return sum(hits) / len(hits) if hits else float("nan")


def flattened(order, sizes):
    """Left to right within each step."""
    flat = []
    for size in sizes:
        flat += sorted(order[len(flat) : len(flat) + size])
    return flat


def compositions(n):
    """All ways to write n tokens in steps."""
    if n == 0:
        yield []
    for first in range(1, n + 1):
        for rest in compositions(n - first):
            yield [first, *rest]


def close(a, b):
    """Equal numbers, or both nan."""
    a, b = float(a), float(b)
    return (isnan(a) and isnan(b)) or abs(a - b) < 1e-12


def test_orders_of_the_papers():
    right = list(range(8))
    for k in (1, 2, 5):
        assert arness(steps_of(right), k).mean == 1
        assert local_arness(steps_of(right), k).mean == 1
        assert local_arness(steps_of(right), k, start="skip").mean == 1
    # Right to left: only once k masks are left is the rightmost among the k leftmost.
    for k in (1, 2, 5):
        assert arness(steps_of(right[::-1]), k).mean == k / 8
        assert local_arness(steps_of(right[::-1]), k).mean == 0
    # Evens then odds: first even and all odds are leftmost, but none follows another.
    zigzag = steps_of([0, 2, 4, 6, 1, 3, 5, 7])
    assert arness(zigzag).mean == 5 / 8 and local_arness(zigzag).mean == 1 / 8
    # Formula (set) and caption (run) differ: 1, 0, 2.
    swapped = steps_of([1, 0, 2])
    assert local_arness(swapped, 2, match="set").mean == 1 / 3
    assert local_arness(swapped, 2, match="run").mean == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_every_order_against_the_definition(n):
    for order in permutations(range(n)):
        step = steps_of(order)
        for k in (1, 2, 3):
            assert close(arness(step, k), global_by_hand(order, k))
            for match in ("run", "set"):
                for start in ("prompt", "skip"):
                    mine = local_arness(step, k, match=match, start=start)
                    assert close(mine, local_by_hand(order, k, match, start))


@pytest.mark.parametrize("n", [1, 3, 5])
def test_chance_is_the_mean_over_all_orders(n):
    orders = list(permutations(range(n)))
    for sizes in compositions(n):
        steps = torch.cat([steps_of(order, sizes) for order in orders])
        for k in (1, 2, 4):
            for tie in ("left_to_right", "set"):
                found = arness(steps, k, tie=tie)
                assert close(found.mean, found.chance[0])
            for match in ("run", "set"):
                for start in ("prompt", "skip"):
                    found = local_arness(steps, k, match=match, start=start)
                    assert close(found.mean, found.chance[0])


def test_chance_of_single_tokens():
    """One token a step: (1/n) sum_R min(1, k/R), whatever the tie rule."""
    n = 30
    for k in (1, 3):
        expected = sum(min(1, k / left) for left in range(1, n + 1)) / n
        for tie in ("left_to_right", "set"):
            chance = arness(torch.arange(n)[None], k, tie=tie).chance
            assert abs(chance.item() - expected) < 1e-12


@given(st.permutations(range(6)), st.sampled_from(list(compositions(6))))
def test_ties_left_to_right_flatten_the_steps(order, sizes):
    flat = flattened(order, sizes)
    step = steps_of(order, sizes)
    for k in (1, 2):
        assert close(arness(step, k), global_by_hand(flat, k))
        assert close(local_arness(step, k), local_by_hand(flat, k, "run", "prompt"))


@given(st.permutations(range(6)), st.sampled_from(list(compositions(6))))
def test_a_set_counts_its_share_among_the_leftmost(order, sizes):
    step, masked, hits, done = steps_of(order, sizes), set(range(6)), 0, 0
    for size in sizes:
        chosen = set(order[done : done + size])
        hits += len(chosen & set(sorted(masked)[: size + 1]))
        masked, done = masked - chosen, done + size
    assert close(arness(step, 2, tie="set"), hits / 6)


@given(st.permutations(range(7)))
def test_monotone_in_k_and_local_below_global(order):
    step = steps_of(order)
    globally = [arness(step, k).mean for k in (1, 2, 3, 7)]
    locally = [local_arness(step, k).mean for k in (1, 2, 3, 7)]
    assert globally == sorted(globally) and globally[-1] == 1
    assert locally == sorted(locally, reverse=True)


def decoded(prompt, **how):
    """A trace of the cheapest model with context."""
    how = dict(length=8, mask_token_id=MASK, generator=gen(3)) | how
    return dlm.decode(Votes(seed=1), prompt, trace=True, **how).trace


def test_traces_of_known_orders():
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert arness(decoded(prompt, propose="left_to_right")).mean == 1
    assert arness(decoded(prompt, propose="left_to_right", steps=3)).mean == 1
    assert arness(decoded(prompt, propose="right_to_left")).mean == 1 / 8
    assert local_arness(decoded(prompt, propose="right_to_left")).mean == 0
    mixed = decoded(prompt, propose="random", steps=3)
    orders = [arness(mixed, tie=t).chance for t in ("left_to_right", "set")]
    assert (orders[0] < 1).all() and (orders[1] < 1).all()


def test_confidence_breaks_ties_by_the_trace():
    """A step that writes all: left to right is 1, by confidence it is a real order."""
    trace = decoded(torch.tensor([[1, 2, 3]]), steps=1)
    assert arness(trace).mean == 1 and arness(trace).above_chance.isnan().all()
    order = (trace.commit_logprob[0, 3:]).argsort(descending=True).tolist()
    assert close(arness(trace, tie="confidence"), global_by_hand(order, 1))
    found = local_arness(trace, tie="confidence")
    assert close(found, local_by_hand(order, 1, "run", "prompt"))
    assert close(found.chance, local_arness(torch.arange(8)[None]).chance)


def test_padding_batch_and_given_tokens_change_nothing():
    rows = [[1, 2, 3], [7], [4, 5, 6, 9, 8]]
    together = arness(decoded(rows, propose="confidence", steps=5))
    for row, value in zip(rows, together.rows, strict=True):
        alone = arness(decoded([row], propose="confidence", steps=5))
        assert close(alone.rows, value)
    step = steps_of([3, 0, 2, 1])
    spaced = torch.full((1, 9), -1)
    spaced[0, [1, 2, 5, 8]] = step[0]  # given tokens between the masks
    for k in (1, 2):
        assert close(arness(spaced, k), arness(step, k))
        assert close(local_arness(spaced, k), local_arness(step, k))
    gaps = steps_of([3, 0, 2, 1]) * 5 + 2  # steps in which other rows were busy
    assert close(arness(gaps), arness(step)) and close(
        arness(gaps).chance, arness(step).chance
    )


def test_columns_leave_the_filler_out():
    """Filler first, then left to right: the words alone are in perfect order."""
    step = torch.tensor([[4, 5, 6, 7, 3, 2, 1, 0]])
    assert arness(step).mean == 1 / 2
    assert arness(step, columns=slice(0, 4)).mean == 1
    chosen = torch.arange(8) < 4
    for columns in (chosen, chosen[None]):
        assert local_arness(step, columns=columns).mean == 1
    nothing = arness(step, columns=torch.zeros(8, dtype=torch.bool))
    assert nothing.rows.isnan().all() and nothing.chance.isnan().all()


def test_the_final_commit_counts():
    """Position 0 is written first, taken back, and written again at the end."""
    trace = decoded(torch.tensor([[1]]), length=3, propose="left_to_right")
    again = torch.zeros_like(trace.written[:1])
    again[0, 0, 1] = True
    trace.written = torch.cat([trace.written, again])
    trace.proposed = torch.cat([trace.proposed, trace.proposed[:1]])
    trace.logprob = torch.cat([trace.logprob, trace.logprob[:1]])
    assert trace.order() == [2, 3, 1]
    assert close(arness(trace), global_by_hand([1, 2, 0], 1))


def test_mean_interval_and_format():
    rows = torch.tensor([0.2, 0.4, 0.6, 0.8, torch.nan])
    found = ARness(rows, torch.zeros(5))
    assert abs(float(found) - 0.5) < 1e-6 and f"{found:.2f}" == "0.50"
    low, high = found.interval()
    half = 1.959964 * rows[:4].std().item() / 2
    assert abs(low - (0.5 - half)) < 1e-5 and abs(high - (0.5 + half)) < 1e-5
    resampled = found.interval(generator=gen(0))
    assert 0.2 <= resampled[0] < 0.5 < resampled[1] <= 0.8
    assert all(isnan(end) for end in mean_interval(rows[:1]))


def test_intervals_cover():
    """Both intervals hold the true mean in about 95 of 100 samples."""
    draws = torch.rand((300, 40), generator=gen(1)).double() ** 2
    for generator in (None, gen(2)):
        ends = [mean_interval(row, generator=generator, draws=300) for row in draws]
        share = sum(low < 1 / 3 < high for low, high in ends) / 300
        assert 0.89 < share < 0.985


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda s: arness(s, 0), "k=0"),
        (lambda s: arness(s, tie="both"), "tie='both'"),
        (lambda s: arness(s, tie="confidence"), "tie='confidence'"),
        (lambda s: arness(s[0]), "trace.dim()=1"),
        (lambda s: local_arness(s, tie="set"), "tie='set'"),
        (lambda s: local_arness(s, match="bag"), "match='bag'"),
        (lambda s: local_arness(s, start="zero"), "start='zero'"),
        (lambda s: arness(s).interval(level=1.0), "level=1.0"),
    ],
)
def test_wrong_input(call, name):
    with pytest.raises(ValueError) as error:
        call(torch.arange(4)[None])
    assert name in str(error.value)
