"""The cache: what may be reused exactly, and what stale keys do."""

import pytest
import torch
from tiny import by_hand, random_ids, tiny_model

from dlmlib.model import KVCache

T = 7
RANGES = [(start, stop) for start in range(T) for stop in range(start + 1, T + 1)]
VARIANTS = {
    "bidirectional": {},
    "grouped": {"num_key_value_heads": 2, "qkv_bias": True},
    "causal": {"attention": "causal"},
    "block": {"attention": "block_causal", "block_length": 3},
}

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=VARIANTS, name="model")
def any_model(request):
    return tiny_model(**VARIANTS[request.param])


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def filled(model, ids, **options):
    """A cache after a full forward, and that forward's logits."""
    cache = KVCache(ids.shape[1])
    return cache, model(ids, cache=cache, **options).logits


def changed_within(ids, start, stop):
    """Other tokens in the columns [start, stop)."""
    other = ids.clone()
    other[:, start:stop] = (ids[:, start:stop] + 1) % 12
    return other


def test_a_full_fill_changes_nothing(model):
    ids = random_ids(2, T)
    cache, logits = filled(model, ids)
    close(logits, model(ids).logits)
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    assert len(cache.keys) == len(cache.values) == model.config.num_hidden_layers
    assert all(part.shape == (2, heads, T, width) for part in cache.keys)


def test_overwriting_with_the_same_tokens_changes_nothing(model):
    """For every range of columns, its logits and all that the cache holds."""
    ids = random_ids(2, T)
    full = model(ids).logits
    for start, stop in RANGES:
        cache, _ = filled(model, ids)
        before = [part.clone() for part in (*cache.keys, *cache.values)]
        part = model(ids[:, start:stop], cache=cache, start=start).logits
        close(part, full[:, start:stop])
        for now, then in zip((*cache.keys, *cache.values), before, strict=True):
            close(now, then)


@pytest.mark.parametrize("variant", ["bidirectional", "grouped"])
def test_changed_tokens_against_stale_keys(variant):
    """After a change, new queries meet new keys inside and the old ones outside."""
    model = tiny_model(**VARIANTS[variant]).double()
    ids = random_ids(1, T)
    for start, stop in RANGES:
        new = changed_within(ids, start, stop)[:, start:stop]
        columns = torch.arange(start, stop)
        cache, _ = filled(model, ids)
        ours = model(new, cache=cache, start=start).logits[0]
        _, stale = by_hand(model, ids[0])
        theirs, attended = by_hand(model, new[0], columns, stale)
        close(ours, theirs, 2e-6)
        for layer, (keys, values) in enumerate(attended):
            close(cache.keys[layer][0], keys, 2e-6)
            close(cache.values[layer][0], values, 2e-6)


def test_stale_keys_are_an_approximation():
    """With two bidirectional layers a change inside should move the keys outside."""
    model, ids = tiny_model(), random_ids(1, T)
    cache, _ = filled(model, ids)
    new = changed_within(ids, 2, 5)
    part = model(new[:, 2:5], cache=cache, start=2).logits
    assert (part - model(new).logits[:, 2:5]).abs().max() > 1e-2
    refreshed = model(new, cache=cache).logits  # a full forward makes it exact again
    close(refreshed, model(new).logits)
    close(model(new[:, 2:5], cache=cache, start=2).logits, refreshed[:, 2:5])


@pytest.mark.parametrize("shift", [False, True])
def test_one_layer_is_exact(shift):
    """Keys of the first layer are of their own token alone, so nothing gets stale."""
    model = tiny_model(num_hidden_layers=1, shift_logits=shift)
    ids = random_ids(2, T)
    for start, stop in RANGES:
        new = changed_within(ids, start, stop)
        cache, _ = filled(model, ids)
        part = model(new[:, start:stop], cache=cache, start=start).logits
        first = int(shift)  # its left neighbour was not fed
        close(part[:, first:], model(new).logits[:, start + first : stop])


@pytest.mark.parametrize("variant", ["causal", "block"])
def test_what_looks_left_only_is_exact(variant):
    """Earlier columns do not see the change, so a rewritten suffix is exact."""
    model, ids = tiny_model(**VARIANTS[variant]), random_ids(2, T)
    block = model.config.block_length if variant == "block" else 1
    for start in range(0, T, block):
        new = changed_within(ids, start, T)
        cache, _ = filled(model, ids)
        part = model(new[:, start:], cache=cache, start=start).logits
        close(part, model(new).logits[:, start:])


@pytest.mark.parametrize("causal", [False, True])
def test_padding(causal):
    """A padded batch through the cache equals each row alone, in every range."""
    model = tiny_model(attention="causal" if causal else "bidirectional")
    pads = torch.tensor([0, 2])
    mask = (torch.arange(T) >= pads[:, None]).long()
    ids = random_ids(2, T) * mask
    places = (mask.cumsum(1) - 1).clamp_min(0)
    for start, stop in RANGES:
        cache, logits = filled(model, ids, attention_mask=mask, position_ids=places)
        part = model(
            ids[:, start:stop],
            attention_mask=mask,
            position_ids=places[:, start:stop],
            cache=cache,
            start=start,
        ).logits
        for row, pad in enumerate(pads.tolist()):
            alone = model(ids[row : row + 1, pad:]).logits[0]
            close(logits[row, pad:], alone)
            inside = slice(max(start, pad) - start, stop - start)
            close(part[row, inside], alone[max(start - pad, 0) : max(stop - pad, 0)])


def test_logits_of_chosen_columns_only(model):
    ids = random_ids(2, T)
    cache, _ = filled(model, ids)
    wanted = torch.tensor([[True, False, True], [False, False, True]])
    part = model(ids[:, 2:5], cache=cache, start=2, logit_positions=wanted).logits
    close(part, model(ids).logits[:, 2:5][wanted])


def test_what_was_stored_is_not_aliased():
    """The first forward's own tensors are copied, and carry no gradient."""
    cache = KVCache(3)
    key = torch.ones(1, 1, 3, 2, requires_grad=True)
    with torch.enable_grad():
        cache.update(0, key, key * 2, start=0)
    assert not cache.keys[0].requires_grad and not cache.values[0].requires_grad
    cache.update(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), start=1)
    assert (key == 1).all()
    assert cache.keys[0][0, 0, :, 0].tolist() == [1, 0, 1]
    assert cache.values[0][0, 0, :, 0].tolist() == [2, 0, 2]


# Wrong input


@pytest.mark.parametrize("length", [0, -1])
def test_length_below_one(length):
    with pytest.raises(ValueError, match=f"length={length}: expected an integer >= 1"):
        KVCache(length)


@pytest.mark.parametrize(("start", "columns"), [(-1, 2), (5, 3), (T, 1), (1, T)])
def test_columns_outside(start, columns):
    model, ids = tiny_model(), random_ids(1, T)
    cache, _ = filled(model, ids)
    message = rf"start={start}: expected columns within \[0, 7\)"
    with pytest.raises(ValueError, match=message):
        model(ids[:, :columns], cache=cache, start=start)


def test_first_forward_must_fill():
    cache = KVCache(T)
    with pytest.raises(ValueError, match="columns=4: expected all 7"):
        tiny_model()(random_ids(1, 4), cache=cache, start=3)


def test_mask_must_cover_the_cache():
    model, ids = tiny_model(), random_ids(1, T)
    cache, _ = filled(model, ids)
    message = r"attention_mask.shape=\(1, 3\): expected \(1, 7\)"
    with pytest.raises(ValueError, match=message):
        model(ids[:, :3], attention_mask=torch.ones(1, 3), cache=cache, start=2)


def test_another_number_of_rows():
    model, ids = tiny_model(), random_ids(2, T)
    cache, _ = filled(model, ids)
    with pytest.raises(ValueError, match="rows"):
        model(ids[:1, 2:4], cache=cache, start=2)
