"""The trace tells the truth: replayed, recomputed from the model, step by step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Votes, gen, tiny_lm, watch

from dlmlib.decoding import EntropyBound, Even, Remask, Scheduled, Threshold, decode

PROMPTS = [[1, 10, 2, 10], [3], [10, 4, 5]]
OPTIONS = {
    "even": dict(steps=5),
    "blocks": dict(steps=6, block_length=3, propose="margin"),
    "scheduled": dict(commit=Scheduled(6, stochastic=True), propose="random"),
    "threshold": dict(commit=Threshold(0.5), propose="entropy"),
    "bound": dict(commit=EntropyBound(0.5), temperature=1.0),
    "cap": dict(steps=6, revise=Remask("cap", 0.6), temperature=0.7),
    "conf": dict(steps=8, revise=Remask("conf"), block_length=4),
    "loop": dict(steps=5, revise=Remask("loop", 0.7, alpha_on=0.4, rounds=4)),
    "guided": dict(steps=4, cfg_scale=1.0),
}


def decoded(name: str, model=None, seed: int = 0, **options):
    model = Votes(seed) if model is None else model
    options = dict(length=5, generator=gen(seed), trace=True) | OPTIONS[name] | options
    return decode(model, PROMPTS, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_replay_ends_at_the_answer(name):
    out = decoded(name)
    trace = out.trace
    shape = (trace.steps, *out.sequences.shape)
    for part in ("proposed", "logprob", "score", "written", "erased"):
        assert getattr(trace, part).shape == shape, part
    assert trace.mask_token_id == 10
    assert trace.valid.sum(1).tolist() == [9, 6, 8]
    start = trace.canvas(0)
    assert torch.equal(start, trace.start)
    for row, prompt in enumerate(PROMPTS):
        assert start[row, 4 - len(prompt) : 4].tolist() == prompt
    assert bool((start[:, 4:] == 10).all())
    assert torch.equal(trace.canvas(trace.steps), out.sequences)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_written_was_open_and_what_is_erased_was_written(name):
    trace = decoded(name).trace
    erasures = 0
    for step in range(trace.steps):
        before, after = trace.canvas(step), trace.canvas(step + 1)
        open_ = trace.proposed[step] >= 0
        assert bool((before[open_] == 10).all()) and bool(trace.valid[open_].all())
        written, erased = trace.written[step], trace.erased[step]
        assert bool((open_ | ~written).all()) and bool(written.any())
        assert bool((before[erased] != 10).all())
        assert not bool((erased & (trace.start != 10)).any())
        assert bool((after[written] == trace.proposed[step][written]).all())
        assert bool((after[erased] == 10).all())
        assert torch.equal(before[~(written | erased)], after[~(written | erased)])
        for part in (trace.logprob, trace.score, trace.confidence):
            assert torch.equal(part[step].isnan(), ~open_)
        erasures += int(erased.sum())
    assert (erasures > 0) == (name in ("cap", "conf", "loop"))


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "guided"])
def test_confidence_is_the_models_own(name):
    for model in (Votes(3), tiny_lm(3)):
        seen = watch(model)
        out = decoded(name, model, seed=3)
        trace = out.trace
        calls = list(seen)
        assert len(calls) == trace.steps == out.forwards
        for step in range(trace.steps):
            open_ = trace.proposed[step] >= 0
            rows = open_.any(1)
            canvas = trace.canvas(step)[rows]
            assert torch.equal(calls[step], canvas)
            options = dict(attention_mask=trace.valid[rows].long())
            if not isinstance(model, Votes):
                places = trace.valid[rows].long().cumsum(1) - 1
                options["position_ids"] = places.clamp_min(0)
            with torch.no_grad():
                p = model(canvas, **options).logits.softmax(-1)
            token = trace.proposed[step][rows].clamp_min(0)
            expected = p.gather(-1, token[..., None])[..., 0]
            found = trace.confidence[step][rows].double()
            here = open_[rows]
            torch.testing.assert_close(found[here], expected[here], rtol=1e-5, atol=0)


def test_the_score_is_what_the_order_ranked_by():
    trace = decoded("even").trace
    assert torch.equal(trace.score.isnan(), trace.logprob.isnan())
    known = ~trace.score.isnan()
    assert torch.equal(trace.score[known], trace.logprob[known])
    trace = decoded("even", propose="left_to_right").trace
    columns = -torch.arange(9.0).expand_as(trace.score)
    known = ~trace.score.isnan()
    assert torch.equal(trace.score[known], columns[known])
    for step in range(trace.steps):  # and the best of a row were written
        for row in range(3):
            scores = trace.score[step, row]
            written = trace.written[step, row]
            if bool(written.any()):
                rest = scores[~written & ~scores.isnan()]
                assert not len(rest) or scores[written].min() >= rest.max()


def replayed_commits(trace):
    """Step and log-probability of the last write of each position, by brute force."""
    step = torch.full(trace.start.shape, -1)
    logprob = torch.full(trace.start.shape, torch.nan)
    for s, row, column in trace.written.nonzero().tolist():
        step[row, column] = s
        logprob[row, column] = trace.logprob[s, row, column]
    return step, logprob


@settings(max_examples=40)
@given(name=st.sampled_from(sorted(OPTIONS)), seed=st.integers(0, 500))
def test_commits_and_order(name, seed):
    out = decoded(name, seed=seed)
    trace = out.trace
    step, logprob = replayed_commits(trace)
    assert torch.equal(trace.commit_step, step)
    torch.testing.assert_close(trace.commit_logprob, logprob, equal_nan=True)
    undecided = (trace.start == 10) & trace.valid
    assert torch.equal(trace.commit_step >= 0, undecided)
    token = trace.proposed.gather(0, step.clamp_min(0)[None])[0]
    assert torch.equal(token[undecided], out.sequences[undecided])
    for row in range(3):
        columns = undecided[row].nonzero()[:, 0].tolist()
        expected = sorted(columns, key=lambda c: (int(step[row, c]), c))
        assert trace.order(row) == expected


def test_a_token_written_twice_counts_for_its_last_write():
    rewritten = 0
    for seed in range(10):
        trace = decoded("loop", seed=seed).trace
        times = trace.written.sum(0)
        for row, column in (times > 1).nonzero().tolist():
            steps = trace.written[:, row, column].nonzero()[:, 0].tolist()
            assert int(trace.commit_step[row, column]) == steps[-1]
            assert bool(trace.erased[steps[0] : steps[-1], row, column].any())
            rewritten += 1
    assert rewritten > 10


@pytest.mark.parametrize("name", OPTIONS)
def test_without_trace_the_answer_is_the_same(name):
    traced, plain = decoded(name), decoded(name, trace=False)
    assert plain.trace is None
    assert torch.equal(plain.sequences, traced.sequences)
    assert plain.forwards == traced.forwards
    calls = 2 if name == "guided" else 1
    took_part = traced.trace.written.any(2).sum(0) * calls
    tokens = traced.trace.written.sum((0, 2))
    assert plain.tokens_per_forward.tolist() == (tokens / took_part).tolist()


def test_rows_that_are_done_leave_no_mark():
    trace = decode(Votes(), [[1, 10], [10, 10]], steps=2, trace=True).trace
    assert trace.steps == 2
    assert trace.proposed[1, 0].tolist() == [-1, -1]
    assert bool(trace.logprob[1, 0].isnan().all())
    assert not bool(trace.written[1, 0].any())


@pytest.mark.parametrize("step", [-1, 6])
def test_a_step_that_does_not_exist(step):
    trace = decode(Votes(), [1], length=5, commit=Even(5), trace=True).trace
    with pytest.raises(ValueError, match=f"step={step}: expected within 0 … 5"):
        trace.canvas(step)


@pytest.mark.parametrize("row", [-1, 1])
def test_a_row_that_does_not_exist(row):
    trace = decode(Votes(), [1], length=2, trace=True).trace
    with pytest.raises(ValueError, match=f"row={row}: expected within 0 … 0"):
        trace.order(row)
