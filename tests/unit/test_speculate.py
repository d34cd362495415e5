"""Speculation: the same answer with fewer forwards, whatever the policies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import nn
from toys import Votes
from transformers.utils import ModelOutput

import dlmlib as dlm
from dlmlib.decoding.reuse import View
from dlmlib.model import DLMConfig
from dlmlib.tasks.toy import Joint

MASK = 10
ORDERS = ["confidence", "entropy", "margin", "left_to_right", "random"]
RULES = {
    "one": lambda: None,
    "even": lambda: dlm.Even(5),
    "threshold": lambda: dlm.Threshold(0.4),
    "entropy": lambda: dlm.EntropyBound(0.5),
}
CACHES = [None, dlm.PrefixCache, dlm.DualCache]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    depth=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    rule=st.sampled_from(sorted(RULES)),
    block=st.sampled_from([None, 3]),
    temperature=st.sampled_from([0.0, 0.5]),
    cfg_scale=st.sampled_from([0.0, 0.7]),
    revise=st.booleans(),
    cache=st.sampled_from(CACHES),
    early=st.booleans(),
    shift=st.booleans(),
    prompts=st.lists(
        st.lists(st.sampled_from([1, 2, 3, MASK]), min_size=1, max_size=4),
        min_size=1,
        max_size=3,
    ),
)
def test_the_answer_is_that_without_drafts(
    seed,
    depth,
    order,
    rule,
    block,
    temperature,
    cfg_scale,
    revise,
    cache,
    early,
    shift,
    prompts,
):
    """Random models and prompts, every policy: equal tokens and traces, in float64.

    With a cache, the answer is the one of that cache, which is not the exact one.
    """
    model = tiny_model(seed, mask_token_id=MASK, shift_logits=shift).double()
    prompts = [[4, *prompt] for prompt in prompts]
    stop = dlm.EarlyCommit(slice(-3, None), (4.0, 3.0, 2.0), steps=6)
    kept = None if cache is None else cache()

    def run(reuse):
        return dlm.decode(
            model,
            prompts,
            length=5,
            block_length=block,
            propose=order,
            commit=RULES[rule](),
            revise=dlm.Remask("cap", 0.5, steps=6) if revise else None,
            reuse=reuse,
            stop=stop if early else None,
            temperature=temperature,
            cfg_scale=cfg_scale,
            generator=dlm.generator(seed),
            trace=True,
        )

    plain, ahead = run(kept), run(dlm.Speculate(depth, kept))
    assert torch.equal(plain.sequences, ahead.sequences)
    assert torch.equal(plain.trace.written, ahead.trace.written)
    assert torch.allclose(
        plain.trace.logprob, ahead.trace.logprob, atol=1e-6, equal_nan=True
    )
    assert ahead.forwards <= plain.forwards
    assert (ahead.tokens_per_forward >= plain.tokens_per_forward).all()


def certain() -> Joint:
    """One possible sentence: what is drafted always comes true."""
    return Joint(torch.arange(8)[None], torch.ones(1), 11, MASK)


@pytest.mark.parametrize(("depth", "forwards"), [(1, 5), (2, 4), (3, 3), (7, 2)])
def test_drafts_that_come_true_are_free(depth, forwards):
    """Eight steps: the first forward has nothing to draft from, then 1 + depth each."""
    out = dlm.decode(
        certain().denoiser(),
        torch.full((3, 8), MASK),
        reuse=dlm.Speculate(depth),
        trace=True,
    )
    assert out.trace.steps == 8
    assert out.forwards == forwards == 1 + -(-7 // (1 + depth))
    assert out.tokens_per_forward.tolist() == pytest.approx([8 / forwards] * 3)


def test_the_pace_of_the_schedule_is_drafted():
    """Two tokens a step: drafts write two at a time and come true as well."""
    blank = torch.full((1, 8), MASK)
    ahead = dlm.Speculate(3)
    out = dlm.decode(certain().denoiser(), blank, steps=4, reuse=ahead)
    plain = dlm.decode(certain().denoiser(), blank, steps=4)
    assert torch.equal(out.sequences, plain.sequences)
    assert (plain.forwards, out.forwards) == (4, 2)


def test_a_forward_is_as_wide_as_its_drafts():
    model, widths = Votes(), []
    model.register_forward_pre_hook(lambda _, given: widths.append(len(given[0])))
    dlm.decode(model, [[1, 2]] * 2, length=6, reuse=dlm.Speculate(3))
    assert widths[0] == 2 and widths[1] == 2 * 4


class Certain(nn.Module):
    """Sure of one sentence, through keys and values that can be kept: c at column c.

    `shapes` are those of its forwards.
    """

    config = DLMConfig(vocab_size=32, mask_token_id=31)

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, input_ids, cache=None, start=0):
        self.shapes.append(tuple(input_ids.shape))
        key = input_ids[:, None, :, None].double()
        if cache is not None:
            cache.update(0, key, key, start)
        columns = start + torch.arange(input_ids.shape[1])
        logits = 50.0 * nn.functional.one_hot(columns, 32).double()
        return ModelOutput(logits=logits.expand(len(input_ids), -1, -1))


def certain_run(**options):
    """The output for two blocks of four behind a prompt of three, and the shapes."""
    model = Certain()
    out = dlm.decode(model, [[0, 1, 2]], length=8, block_length=4, **options)
    assert out.sequences.tolist() == [list(range(11))]
    return out, model.shapes


@pytest.mark.parametrize(("cache", "inner"), [(dlm.PrefixCache, 8), (dlm.DualCache, 4)])
def test_drafts_share_a_block_cache(cache, inner):
    """A block is refreshed alone, then its open canvases are rows of one forward.

    The first step leaves three masks: three canvases have something to write, and the
    one of the full block is not computed.
    """
    _, plain = certain_run(reuse=cache())
    one = [(1, 11)] + 3 * [(1, inner)]
    assert plain == one + [(1, 11)] + 3 * [(1, 4)]
    out, shapes = certain_run(reuse=dlm.Speculate(5, cache()))
    assert shapes == [(1, 11), (3, inner), (1, 11), (3, 4)]
    assert out.forwards == 4
    out, shapes = certain_run(reuse=dlm.Speculate(1, cache()))
    assert shapes[:3] == [(1, 11), (2, inner), (1, inner)] and out.forwards == 6


def test_watched_columns_are_not_drafted():
    """Drafts write only what the step may write, so early commitment costs none."""
    ahead = {"reuse": dlm.Speculate(3, dlm.DualCache())}
    watch = dlm.EarlyCommit(slice(None), (1e9, 1e9, 1e9), steps=8)
    assert certain_run(**ahead, stop=watch)[0].forwards == 4
    assert certain_run(**ahead)[0].forwards == 4


def test_what_was_drafted_in_another_block_is_void():
    """The canvas of a draft comes back in the next block: it is refreshed all the same.

    Without a cache nothing of a draft is stale, and it stays good.
    """
    mask = Certain.config.mask_token_id
    start = torch.tensor([[0, mask, mask, mask]])
    second = torch.tensor([[0, 1, mask, mask]])
    third = torch.tensor([[0, 1, 2, mask]])
    calls = {}
    for name, cache in {"none": None, "dual": dlm.DualCache()}.items():
        model, calls[name] = Certain(), []
        drafts = dlm.Speculate(3, cache).begin(model)
        for ids, phase in ((start, 0), (second, 0), (third, 0), (third, 1)):
            open_ = ids == mask
            view = View(None, torch.tensor([phase]), torch.tensor([True]), open_)
            drafts(model, view, torch.tensor([0]), ids, open_)
            calls[name].append(drafts.calls)
    assert calls == {"none": [1, 1, 0, 0], "dual": [1, 1, 0, 1]}
    assert model.shapes == [(1, 4), (2, 3), (1, 4)]


def test_fewer_forwards_than_with_the_cache_alone():
    """Random networks, rows in different blocks, guidance: less is paid in the sum."""
    forwards = []
    for seed in range(4):
        model = tiny_model(seed, mask_token_id=MASK).double()
        options = {"length": 9, "block_length": 3, "cfg_scale": 0.5}
        for reuse in (dlm.DualCache(), dlm.Speculate(4, dlm.DualCache())):
            out = dlm.decode(model, [[1, 2, 3, MASK], [4]], reuse=reuse, **options)
            forwards.append(out.forwards)
    assert sum(forwards[1::2]) < sum(forwards[::2])


@pytest.mark.parametrize("cache", [dlm.DualCache, "dual", dlm.Speculate(2)])
def test_another_cache_is_refused(cache):
    with pytest.raises(ValueError, match=r"cache=.*: expected PrefixCache\(\), DualC"):
        dlm.Speculate(2, cache)


@pytest.mark.parametrize("depth", [0, -1, 1.5])
def test_wrong_depth_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth={depth}: expected an integer >= 1"):
        dlm.Speculate(depth)
