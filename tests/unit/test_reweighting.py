"""Context-adaptive weights against their definition, and the adapted model."""

import pytest
import torch
import torch.nn.functional as F
from tiny import random_ids, tiny_model

from dlmlib.diffusion.reweighting import CART, context_weights
from dlmlib.model.adapt import to_diffusion

MASK = 12


def brute_force(hidden, visible, p):
    """w_i = sum over visible j of Geo(|i - j|) / 2, one pair at a time."""
    weights = torch.zeros(hidden.shape)
    for row, i in hidden.nonzero().tolist():
        for j in visible[row].nonzero()[:, 0].tolist():
            weights[row, i] += 0.5 * p * (1 - p) ** (abs(i - j) - 1)
    return weights


def random_states(rows=40, columns=9, seed=0):
    """Hidden and visible tokens, and some that are neither, as padding is."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(3, (rows, columns), generator=generator)
    return state == 0, state == 1


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8, 1.0])
def test_weights_are_their_definition(p):
    hidden, visible = random_states()
    expected = brute_force(hidden, visible, p)
    torch.testing.assert_close(context_weights(hidden, visible, p), expected)


@pytest.mark.parametrize("p", [0.1, 0.8])
def test_weights_turn_with_the_row_and_move_along_it(p):
    hidden, visible = random_states()
    weights = context_weights(hidden, visible, p)
    mirrored = context_weights(hidden.flip(1), visible.flip(1), p)
    torch.testing.assert_close(mirrored, weights.flip(1))
    moved = context_weights(F.pad(hidden, (4, 2)), F.pad(visible, (4, 2)), p)
    torch.testing.assert_close(moved, F.pad(weights, (4, 2)))


def test_an_empty_canvas_counts_nothing_and_a_far_context_everything():
    empty = torch.ones(1, 6, dtype=torch.bool)
    assert (context_weights(empty, ~empty, 0.3) == 0).all()
    one = torch.zeros(1, 401, dtype=torch.bool)
    one[0, 200] = True
    torch.testing.assert_close(context_weights(one, ~one, 0.1).sum(), torch.tensor(1.0))


def test_the_mean_weight_falls_linearly_with_time():
    """E[w_i] = (1 - t) sum_j Geo(|i - j|) / 2, where NELBO has 1 / t."""
    t, p, rows, columns = 0.7, 0.3, 40_000, 7
    draw = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    hidden = draw < t
    weights = context_weights(hidden, ~hidden, p)
    all_but = ~torch.eye(columns, dtype=torch.bool)
    full = brute_force(~all_but, all_but, p).diagonal()
    mean = weights.sum(0) / hidden.sum(0)
    error = 4 * weights.std(0) / (rows * t) ** 0.5
    assert ((mean - (1 - t) * full).abs() < error).all()


def test_the_loss_is_the_weighted_sum_of_cross_entropies():
    model, ids = tiny_model(), random_ids(6, 8)
    objective = CART(MASK, p=0.3)
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, :2] = False  # a prompt: visible, never hidden
    batch = {"input_ids": ids, "maskable": maskable}
    noised = objective.corrupt(batch, torch.Generator().manual_seed(1))
    hidden = noised["noisy_ids"] == MASK
    assert hidden.any() and not hidden[:, :2].any()
    weights = brute_force(hidden, ~hidden, 0.3)
    with torch.no_grad():
        logits = model(noised["noisy_ids"]).logits
        loss = objective(model, noised)
    nats = -logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    torch.testing.assert_close(loss, (weights * nats).sum(1))
    assert noised["tokens"].tolist() == [6] * 6


def test_padding_gives_no_context():
    ids, padding = random_ids(64, 8), torch.ones(64, 8, dtype=torch.long)
    padding[:, 5:] = 0
    noise, objective = torch.Generator().manual_seed(2), CART(MASK, p=0.2)
    noised = objective.corrupt({"input_ids": ids, "attention_mask": padding}, noise)
    hidden = noised["noisy_ids"] == MASK
    expected = brute_force(hidden, ~hidden & padding.bool(), 0.2)
    torch.testing.assert_close(noised["weight"], expected)


def test_rows_do_not_depend_on_one_another():
    model, ids = tiny_model(), random_ids(5, 8)
    objective = CART(MASK)
    noised = objective.corrupt({"input_ids": ids}, torch.Generator().manual_seed(3))
    alone = {k: v[2:3] for k, v in noised.items()}
    with torch.no_grad():
        together, single = objective(model, noised), objective(model, alone)
    torch.testing.assert_close(together[2:3], single)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5])
def test_sharpness_outside_its_range(p):
    with pytest.raises(ValueError, match=r"^p\b"):
        CART(MASK, p=p)


@pytest.mark.parametrize("shift", [True, False])
def test_adaptation_keeps_weights_and_moves_what_is_read(shift):
    causal = tiny_model(attention="causal", shift_logits=True)
    adapted = to_diffusion(causal, shift_logits=shift)
    assert adapted.config.attention == "bidirectional"
    assert causal.config.attention == "causal"
    twin = tiny_model(shift_logits=shift)  # the same seed, hence the same weights
    ids = random_ids(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, twin(ids).logits)
    next(adapted.parameters()).data.zero_()
    assert next(causal.parameters()).abs().sum() > 0


def test_only_causal_models_with_a_mask_token_are_adapted():
    with pytest.raises(ValueError, match="causal"):
        to_diffusion(tiny_model())
    nameless = tiny_model(attention="causal", shift_logits=True, mask_token_id=None)
    with pytest.raises(ValueError, match="mask_token_id"):
        to_diffusion(nameless)
    assert to_diffusion(nameless, mask_token_id=12).config.mask_token_id == 12
