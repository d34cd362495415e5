"""Caches: what is computed, what is kept, and that rows stay independent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from toys import Votes

import dlmlib as dlm
from dlmlib.model.kv_cache import KVCache

MASK = 10
CACHES = {"prefix": dlm.PrefixCache, "dual": dlm.DualCache}
RULES = {
    "one": lambda: None,
    "threshold": lambda: dlm.Threshold(0.2),
    "pauses": lambda: dlm.Scheduled(20),  # some steps write nothing in some rows
}


def model_of(seed: int = 0, **options):
    """A random model in float64, so that rows alone and in a batch agree exactly."""
    torch.manual_seed(seed)
    return tiny_model(mask_token_id=MASK, **options).double()


def fed_columns(model, *arguments, **options):
    """The output of a decode and the width of every forward."""
    widths = []
    hook = model.register_forward_pre_hook(
        lambda _, given: widths.append(given[0].shape)
    )
    out = dlm.decode(model, *arguments, **options)
    hook.remove()
    return out, [tuple(shape) for shape in widths]


@pytest.mark.parametrize(("cache", "inner"), [("prefix", (8, 4)), ("dual", (4, 4))])
def test_columns_that_are_computed(cache, inner):
    """The first step of a block computes all 11 columns, the others few."""
    options = {"length": 8, "block_length": 4, "steps": 8, "reuse": CACHES[cache]()}
    _, widths = fed_columns(model_of(), [[1, 2, 3]], **options)
    first, second = ((1, width) for width in inner)
    assert widths == [(1, 11), first, first, first, (1, 11), second, second, second]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_one_step_a_block_is_exact(cache, cfg_scale):
    """Every forward is then a refresh, so nothing stale is read."""
    options = {"length": 8, "block_length": 2, "steps": 4, "cfg_scale": cfg_scale}
    plain = dlm.decode(model_of(), [[1, 2, 3]], trace=True, **options)
    cached = dlm.decode(
        model_of(), [[1, 2, 3]], reuse=CACHES[cache](), trace=True, **options
    )
    assert torch.equal(plain.sequences, cached.sequences)
    assert torch.allclose(
        plain.trace.logprob, cached.trace.logprob, atol=1e-6, equal_nan=True
    )
    assert plain.forwards == cached.forwards


def test_prefix_cache_of_a_block_causal_model_is_exact():
    """What lies left of a block never sees it, so what is kept is never stale."""
    model = model_of(attention="block_causal", block_length=4)
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8]]
    options = {"length": 8, "block_length": 4, "steps": 8, "trace": True}
    plain = dlm.decode(model, prompts, **options)
    cached = dlm.decode(model, prompts, reuse=dlm.PrefixCache(), **options)
    assert torch.equal(plain.sequences, cached.sequences)
    assert torch.allclose(
        plain.trace.logprob, cached.trace.logprob, atol=1e-6, equal_nan=True
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    cache=st.sampled_from(sorted(CACHES)),
    rule=st.sampled_from(sorted(RULES)),
    early=st.booleans(),
    depth=st.sampled_from([0, 0, 2]),
    shift=st.booleans(),
    cfg_scale=st.sampled_from([0.0, 0.5]),
    prompts=st.lists(
        st.lists(st.sampled_from([1, 2, 3, MASK]), min_size=1, max_size=5),
        min_size=2,
        max_size=4,
    ),
)
def test_rows_do_not_see_their_neighbours(
    seed, cache, rule, early, depth, shift, cfg_scale, prompts
):
    """Ragged rows with masks of their own, which enter blocks, pause and end apart.

    With a depth, drafts are computed over the cache.
    """
    model = model_of(seed, shift_logits=shift)
    prompts = [[5, *prompt] for prompt in prompts]
    options = {"length": 6, "block_length": 3, "cfg_scale": cfg_scale}
    options["commit"] = RULES[rule]()
    if early:
        options["stop"] = dlm.EarlyCommit(slice(-2, None), (1.5, 1.0, 0.5), 6)
    options["reuse"] = CACHES[cache]()
    if depth:
        options["reuse"] = dlm.Speculate(depth, options["reuse"])
    together = dlm.decode(model, prompts, trace=True, **options)
    assert not (together.sequences == MASK).any()
    for row, prompt in enumerate(prompts):
        alone = dlm.decode(model, [prompt], **options)
        width = alone.sequences.shape[1]
        assert torch.equal(together.sequences[row, -width:], alone.sequences[0])
        assert together.tokens_per_forward[row] == alone.tokens_per_forward[0]


def test_shifted_logits_read_their_left_neighbour():
    """With nothing changed since the refresh, cached logits are the plain ones."""
    model = model_of(shift_logits=True)
    options = {"length": 4, "block_length": 4, "temperature": 0.0, "trace": True}
    cached = dlm.decode(model, [[1, 2, 3]], reuse=dlm.DualCache(), steps=2, **options)
    step = cached.trace.canvas(1)
    cache = KVCache(7)
    start = cached.trace.canvas(0)
    with torch.no_grad():
        model(start, cache=cache)
        logits = model(step[:, 2:], cache=cache, start=2).logits[:, 1:]  # columns 3 … 6
    expected = logits.double().log_softmax(-1)
    for column in range(3, 7):
        seen = cached.trace.logprob[1, 0, column].item()
        if step[0, column] == MASK:
            token = cached.trace.proposed[1, 0, column]
            assert seen == pytest.approx(
                expected[0, column - 3, token].item(), abs=1e-6
            )


def test_a_model_without_a_cache_is_named():
    with pytest.raises(ValueError, match=r"model='Votes': expected .*cache"):
        dlm.decode(Votes(), [[1, 2]], length=2, reuse=dlm.DualCache())


def test_rows_of_a_cache_are_copies():
    cache = KVCache(3)
    key = torch.arange(12.0).view(2, 1, 3, 2)
    cache.update(0, key, -key, 0)
    second = cache.rows(torch.tensor([1]))
    second.update(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), 2)
    assert torch.equal(cache.keys[0], key)
    assert torch.equal(second.keys[0][0, 0, :2], key[1, 0, :2])
    assert not second.values[0][0, 0, 2].any()
