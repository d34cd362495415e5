"""Parallel-forced decoding: counts by step, order inside streams, trivial cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from toys import Votes, gen

import dlmlib as dlm
from dlmlib.decoding.where import Streams

M = Votes.mask_token_id
LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def structured(lengths, summary=0):
    """[7] header masks … header masks, and the slices of the masks."""
    ids, ranges = [7], []
    for index, length in enumerate([*lengths, *([summary] if summary else [])]):
        ids.append(index)  # a header
        ranges.append(slice(len(ids), len(ids) + length))
        ids += [M] * length
    last = ranges.pop() if summary else None
    return ids, ranges, last


def decode(ids, where, rows=2, **how):
    """Fill the masks of a row, and of a second one with another first token."""
    prompt = torch.tensor([ids] * rows)
    prompt[:, 0] = torch.arange(rows)
    how = dict(mask_token_id=M, trace=True, generator=gen(0)) | how
    return dlm.decode(Votes(seed=2), prompt, where=where, **how)


def dealt(lengths, budget):
    """Tokens of each stream when a budget is dealt one at a time, in rounds."""
    given, left = [0] * len(lengths), list(lengths)
    while budget > 0 and any(left):
        turn = [i for i, n in enumerate(left) if n]
        if budget < len(turn):
            return given, turn, budget  # a last, partial round: the surest
        for i in turn:
            given[i], left[i] = given[i] + 1, left[i] - 1
        budget -= len(turn)
    return given, [], 0


@given(LENGTHS, st.integers(0, 4), st.integers(2, 12), st.booleans())
def test_every_step_deals_its_budget(lengths, summary, steps, concurrent):
    ids, ranges, last = structured(lengths, summary)
    out = decode(ids, Streams(ranges, last, concurrent=concurrent), steps=steps)
    assert not (out.sequences == M).any()
    assert out.trace.written.sum((0, 2)).tolist() == [sum(lengths) + summary] * 2
    assert out.trace.steps <= steps
    streams = [*ranges, last] if summary and concurrent else ranges
    for written in out.trace.written.transpose(0, 1):  # a row
        left = [s.stop - s.start for s in streams]
        for now in written:
            counts = [int(now[s].sum()) for s in streams]
            if not sum(counts):
                continue
            sure, turn, extra = dealt(left, sum(counts))
            more = [count - base for count, base in zip(counts, sure, strict=True)]
            assert sum(more) == extra and set(more) <= {0, 1}
            assert all(i in turn for i, one in enumerate(more) if one)
            left = [n - count for n, count in zip(left, counts, strict=True)]


@given(LENGTHS, st.integers(1, 4), st.integers(2, 12))
def test_the_summary_waits(lengths, summary, steps):
    ids, ranges, last = structured(lengths, summary)
    step = decode(ids, Streams(ranges, last), steps=steps).trace.commit_step
    for row in step:
        in_streams = torch.cat([row[s] for s in ranges])
        assert in_streams.max() < row[last].min()


def test_steps_are_shared_by_tokens():
    """18 + 6 tokens in 8 steps: three a step, in both phases."""
    ids, ranges, last = structured([6, 6, 6], summary=6)
    out = decode(ids, Streams(ranges, last), steps=8)
    assert out.trace.written[:, 0].sum(1).tolist() == [3] * 8
    for s in ranges:
        assert out.trace.written[:, 0, s].sum(1).tolist() == [1] * 6 + [0] * 2
    two = decode(ids, Streams(ranges, last), steps=2)
    assert two.trace.written[:, 0].sum(1).tolist() == [18, 6]


def test_the_summary_gets_its_steps():
    """18 + 6 tokens in 8 steps, five of them for the summary; never all of them."""
    ids, ranges, last = structured([6, 6, 6], summary=6)
    for steps, own, expected in [
        (8, 5, [6] * 3 + [2] + [1] * 4),
        (8, 6, [9] * 2 + [1] * 6),
        (3, 6, [18] + [3] * 2),
    ]:
        where = Streams(ranges, last, summary_steps=own)
        written = decode(ids, where, steps=steps).trace.written[:, 0]
        assert written.sum(1).tolist() == expected
        assert written[-min(own, steps - 1) :, last].sum() == 6


def test_leftover_budget_goes_on():
    """Lengths 1, 2, 5 and four tokens a step: 1 + 2 + 1, then the long one alone."""
    ids, ranges, _ = structured([1, 2, 5])
    out = decode(ids, Streams(ranges), steps=2)
    counts = [[int(w[s].sum()) for s in ranges] for w in out.trace.written[:, 0]]
    assert sorted(counts[0]) == [1, 1, 2] and counts[0][0] == 1
    assert [sum(c) for c in counts] == [4, 4]


@given(LENGTHS, st.integers(1, 6), st.sampled_from(["confidence", "entropy", "random"]))
def test_inside_a_stream_the_order_decides(lengths, steps, order):
    """What a stream writes at a step is the best-ranked of its open positions."""
    ids, ranges, _ = structured(lengths)
    trace = decode(ids, Streams(ranges), steps=steps, propose=order).trace
    for score, written in zip(trace.score, trace.written, strict=True):
        for s in ranges:
            for ranked, now in zip(score[:, s], written[:, s], strict=True):
                best = ranked[now].min() if now.any() else torch.inf
                rest = ranked[~now & ~ranked.isnan()]
                assert not now.any() or not len(rest) or best >= rest.max()


@given(st.integers(1, 10), st.integers(1, 10))
def test_one_stream_is_everywhere(length, steps):
    ids, ranges, _ = structured([length])
    mine = decode(ids, Streams(ranges), steps=steps)
    plain = decode(ids, dlm.Everywhere(), steps=steps)
    assert torch.equal(mine.trace.commit_step, plain.trace.commit_step)
    assert torch.equal(mine.sequences, plain.sequences)


@given(st.integers(1, 6), st.integers(1, 4))
def test_a_stream_and_its_summary_are_blocks(length, per_phase):
    """Two phases of equal size with no header between them."""
    ids = [0, 1] + [M] * (2 * length)
    where = Streams([slice(2, 2 + length)], slice(2 + length, None))
    mine = decode(ids, where, steps=2 * per_phase)
    blocks = decode(ids, dlm.Blocks(length, start=2), steps=2 * per_phase)
    assert torch.equal(mine.trace.commit_step, blocks.trace.commit_step)
    assert torch.equal(mine.sequences, blocks.sequences)


@pytest.mark.parametrize("reuse", [dlm.PrefixCache(), dlm.DualCache()])
def test_over_a_cache_a_stream_and_its_summary_are_blocks(reuse):
    """The cache is refreshed when the summary opens, as at the next block."""
    model = tiny_model(1, mask_token_id=M).double()
    ids = torch.tensor([[0, 1] + [M] * 6, [3, 2] + [M] * 6])
    where = Streams([slice(2, 5)], slice(5, None))
    how = dict(steps=4, reuse=reuse, trace=True)
    mine = dlm.decode(model, ids, where=where, **how)
    blocks = dlm.decode(model, ids, where=dlm.Blocks(3, start=2), **how)
    assert torch.equal(mine.sequences, blocks.sequences)
    assert torch.equal(mine.trace.commit_step, blocks.trace.commit_step)
    torch.testing.assert_close(
        mine.trace.commit_logprob, blocks.trace.commit_logprob, equal_nan=True
    )
    plain = dlm.decode(model, ids, where=where, steps=4, trace=True)
    away = plain.trace.commit_logprob - mine.trace.commit_logprob
    assert away.nan_to_num(0.0).abs().max() > 1e-6, "kept keys are an approximation"


def test_streams_of_single_positions_are_written_at_once_by_threshold():
    """An adaptive rule keeps its own: all that pass, or the one best."""
    ids, ranges, last = structured([3, 3], summary=2)
    sure = decode(ids, Streams(ranges, last), commit=dlm.Threshold(1e-9))
    assert sure.trace.written[:, 0].sum(1).tolist() == [6, 2]
    careful = decode(ids, Streams(ranges, last), commit=dlm.Threshold(1.0))
    assert careful.trace.written[:, 0].sum(1).tolist() == [1] * 8


def test_ragged_prompts_and_half_filled_streams():
    """Columns count from the end; rows whose streams are full begin the summary."""
    ids, _, _ = structured([3, 3], summary=2)
    where = Streams([slice(-10, -7), slice(-6, -3)], slice(-2, None))
    full = [M if t == M else t for t in ids]
    done = [3 if t == M and i < len(ids) - 2 else t for i, t in enumerate(ids)]
    prompts = [ids, [5, 5, *ids], done]
    out = dlm.decode(
        Votes(seed=2), prompts, where=where, steps=4, mask_token_id=M, trace=True
    )
    assert full == ids and not (out.sequences == M).any()
    alone = dlm.decode(
        Votes(seed=2), [done], where=where, steps=4, mask_token_id=M, trace=True
    )
    assert torch.equal(alone.sequences[0], out.sequences[2, 2:])
    assert alone.trace.written.sum((1, 2)).tolist() == [1, 1]
    short = dlm.decode(Votes(seed=2), [ids], where=where, steps=4, mask_token_id=M)
    assert torch.equal(short.sequences[0], out.sequences[0, 2:])


def test_remasking_stays_in_the_phase():
    ids, ranges, last = structured([4, 4], summary=3)
    out = decode(ids, Streams(ranges, last), steps=8, revise=dlm.Remask("cap", eta=0.5))
    assert not (out.sequences == M).any() and out.trace.erased.any()
    first = (out.trace.written[:, 0, last].any(1)).nonzero()[0, 0]
    for s in ranges:
        assert not out.trace.erased[first:, 0, s].any()


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: Streams([]), "streams=[]"),
        (lambda: Streams([slice(1, 5)], summary_steps=0), "summary_steps=0"),
        (lambda: Streams([slice(3, 3), slice(1, 5)]), "slice(3, 3, None)"),
        (lambda: Streams([slice(1, 3), slice(2, 5)]), "slice(2, 5, None)"),
        (lambda: Streams([slice(1, 3)]), "a range for every [MASK]"),
        (lambda: Streams([slice(1, 4)], slice(4, 5)), "steps=1"),
    ],
)
def test_wrong_input(build, name):
    with pytest.raises(ValueError) as error:
        decode([7, M, M, M, M], build(), steps=1)
    assert name in str(error.value)
