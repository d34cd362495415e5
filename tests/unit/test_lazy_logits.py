"""Logits computed a few at a time: the same answers, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_call import Plain, Wrapper, bert
from tiny import random_ids, tiny_model

import dlmlib as dlm
from dlmlib.decoding.propose import NAMED
from dlmlib.gauges import extra_memory
from dlmlib.model import lazy_logits
from dlmlib.model.call import logits_at
from dlmlib.model.lazy_logits import LazyLogits, by_chunks, lazy_logits_at

MASK, V = 12, 13
REUSE = {
    "none": lambda: None,
    "prefix": dlm.PrefixCache,
    "dual": dlm.DualCache,
    "ahead": lambda: dlm.Speculate(2),
}
COMMIT = {
    "one": lambda: None,
    "even": lambda: dlm.Even(4),
    "threshold": lambda: dlm.Threshold(0.4),
    "entropy": lambda: dlm.EntropyBound(0.5),
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def dense(logits) -> torch.Tensor:
    """All logits at once."""
    return torch.cat(list(logits.split(2)))


def lazy(rows: int = 7, seed: int = 0) -> tuple[LazyLogits, torch.Tensor]:
    """Lazy logits of a linear output layer, and what they are."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 4, generator=generator).double()
    weight = torch.randn(4, V, generator=torch.Generator().manual_seed(9)).double()
    return LazyLogits(states, lambda part: part @ weight, V), states @ weight


# Rows are chosen first and computed when read


def test_rows_are_those_of_the_tensor():
    logits, expected = lazy()
    assert logits.shape == expected.shape
    assert [len(part) for part in logits.split(3)] == [3, 3, 1]
    order = torch.tensor([4, 0, 4, 6])
    for index in (order, torch.arange(7) % 2 == 0, slice(2, 5)):
        torch.testing.assert_close(dense(logits[index]), expected[index])
    other, more = lazy(3, seed=1)
    joined = LazyLogits.cat([logits, other])
    torch.testing.assert_close(dense(joined), torch.cat([expected, more]))


def test_nothing_to_read():
    """No rows are one empty part, as of a tensor."""
    assert [part.shape for part in lazy(0)[0].split(2)] == [(0, V)]


def test_pairs_are_the_two_halves():
    logits, expected = lazy(6)
    told, untold = expected.chunk(2)
    torch.testing.assert_close(dense(logits.paired(torch.sub)), told - untold)
    assert logits.paired(torch.sub).shape == (3, V)


@pytest.mark.parametrize(("chunk", "sizes"), [(1, [1] * 7), (40, [3, 3, 1])])
def test_chunks_hold_what_fits(monkeypatch, chunk, sizes):
    """At least a row; other tensors are split alike, and a tensor as lazy logits."""
    monkeypatch.setattr(lazy_logits, "CHUNK", chunk)
    logits, expected = lazy()
    for both in (logits, expected):
        parts = by_chunks(lambda part, rows: (part, rows), both, torch.arange(7))
        assert [len(part) for part, _ in parts] == sizes
        torch.testing.assert_close(torch.cat([part for part, _ in parts]), expected)
        assert torch.cat([columns for _, columns in parts]).tolist() == list(range(7))


# Any model


@pytest.mark.parametrize("wrap", [lambda m: m, Plain, Wrapper, lambda m: m.forward])
@pytest.mark.parametrize("shift", [False, True])
def test_lazy_logits_are_the_logits(wrap, shift):
    """Of ours, of a wrapped one, of one without the option; with padding too."""
    model = tiny_model(shift_logits=shift).double()
    ids, positions = random_ids(3, 6), random_ids(3, 6, seed=1) > 6
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    for padding in (None, mask) if wrap is not Plain else (None,):
        logits = lazy_logits_at(wrap(model), ids, positions, padding)
        expected = logits_at(model, ids, positions, padding)
        torch.testing.assert_close(dense(logits), expected)


def test_a_bert_is_only_wrapped():
    """It has an output layer of another name and no `states_only`."""
    model, ids = bert(), random_ids(2, 4)
    logits = lazy_logits_at(model, ids, ids > 3)
    torch.testing.assert_close(dense(logits), model(ids).logits[ids > 3])


def test_states_only_leaves_the_output_layer_out():
    model, ids = tiny_model(), random_ids(2, 5)
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    out = model(ids, logit_positions=ids > 3, states_only=True)
    assert out.logits is None and rows == []
    logits = lazy_logits_at(model, ids, ids > 3)
    assert rows == []
    expected = model(ids, logit_positions=ids > 3).logits
    torch.testing.assert_close(model.lm_head(out.states), expected)
    rows.clear()
    parts = logits[:3].split(2)
    next(parts)
    assert rows == [2]  # the rest is not computed before it is read


# Decoding


def decoded(monkeypatch, chunk: int, model, prompts, seed: int, **options):
    """A traced decode with so many logits at once."""
    with monkeypatch.context() as patch:
        patch.setattr(lazy_logits, "CHUNK", chunk)
        draws = dlm.generator(seed)
        return dlm.decode(
            model,
            prompts,
            length=6,
            mask_token_id=MASK,
            generator=draws,
            trace=True,
            **options,
        )


def same(one, other):
    """Tokens and steps are equal, and numbers up to rounding."""
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.trace.written, other.trace.written)
    assert torch.equal(one.trace.proposed, other.trace.proposed)
    assert one.forwards == other.forwards
    for field in ("logprob", "score"):
        ours, theirs = getattr(one.trace, field), getattr(other.trace, field)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    order=st.sampled_from(sorted(NAMED)),
    commit=st.sampled_from(sorted(COMMIT)),
    reuse=st.sampled_from(sorted(REUSE)),
    temperature=st.sampled_from([0.0, 0.7]),
    cfg_scale=st.sampled_from([0.0, 0.5]),
    early=st.booleans(),
    shift=st.booleans(),
)
def test_chunks_change_nothing(
    patch, seed, order, commit, reuse, temperature, cfg_scale, early, shift
):
    """Every policy, one position at a time against all at once, in float64.

    The draws are the same too. Only random ranks and random tokens together are drawn
    in another order, chunk by chunk.
    """
    if order == "random":
        temperature = 0.0
    model = tiny_model(seed, mask_token_id=MASK, shift_logits=shift).double()
    stop = dlm.EarlyCommit(slice(-2, None), (1.5, 1.0, 0.5), 6) if early else None
    options = {
        "propose": order,
        "block_length": 3,
        "temperature": temperature,
        "cfg_scale": cfg_scale,
        "stop": stop,
    }
    prompts = [[1, 2, MASK], [3], [5, 6, 7]]
    one, whole = (
        decoded(
            patch,
            chunk,
            model,
            prompts,
            seed,
            commit=COMMIT[commit](),
            reuse=REUSE[reuse](),
            **options,
        )
        for chunk in (V, 2**22)
    )
    same(one, whole)


@pytest.mark.parametrize("order", sorted(NAMED))
@pytest.mark.parametrize("early", [False, True])
def test_chunks_change_nothing_of_a_plain_model(monkeypatch, order, early):
    """Neither do chunks, nor does it that the model computes all logits itself."""
    model = tiny_model(mask_token_id=MASK).double()
    stop = dlm.EarlyCommit(slice(-2, None), (1.5, 1.0, 0.5), 9) if early else None
    options = {"propose": order, "stop": stop, "steps": 4}
    prompts = [[1, 2, 3], [4, MASK, 6]]
    outs = [
        decoded(monkeypatch, chunk, kind, prompts, 0, **options)
        for kind, chunk in ((model, 2**22), (Plain(model), V), (Plain(model), 2**22))
    ]
    same(outs[0], outs[1])
    same(outs[0], outs[2])


def test_the_models_own_logits_are_not_written_to():
    """A table hands out its parameters; masking and guiding work on copies."""
    table = torch.randn(6, V, generator=dlm.generator(0))

    def model(input_ids):
        rows = table[: input_ids.shape[1]].expand(len(input_ids), -1, -1)
        return dlm.model.network.DLMOutput(logits=rows)

    before = table.clone()
    options = {"length": 4, "mask_token_id": MASK, "generator": dlm.generator(0)}
    for more in ({}, {"temperature": 1.0}, {"cfg_scale": 1.0, "propose": "entropy"}):
        dlm.decode(model, [[1, 2]], **options, **more)
        assert torch.equal(table, before)


# Memory


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"propose": "entropy"},
        {"propose": "margin"},
        {"cfg_scale": 1.0},
        {"stop": dlm.EarlyCommit(slice(-64, None))},
        {"reuse": dlm.DualCache()},
        {"reuse": dlm.Speculate(2)},
    ],
    ids=["plain", "sampled", "entropy", "margin", "guided", "early", "dual", "drafts"],
)
def test_memory_grows_with_the_chunk_and_not_with_the_canvas(monkeypatch, options):
    """A step's peak: less than four chunks, whatever the number of open positions."""
    words, rows = 8000, 8
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = tiny_model(vocab_size=words, num_hidden_layers=1, **sizes)
    monkeypatch.setattr("dlmlib.decoding.propose.SAMPLING_CHUNK", rows * words // 8)

    def peak(length: int, chunk: int) -> int:
        monkeypatch.setattr(lazy_logits, "CHUNK", chunk)
        options_now = {"length": length, "mask_token_id": 0, "steps": 2, **options}
        return extra_memory(lambda: dlm.decode(model, [[1]], **options_now), "cpu")

    chunk = rows * words
    small, large = peak(64, chunk), peak(128, chunk)
    slack = 400_000  # the network's own, which does grow
    assert large < small + slack < 4 * 4 * chunk + 2 * slack
    assert 4 * chunk < small
    assert peak(64, 4 * chunk) > 2 * small
