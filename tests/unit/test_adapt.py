"""An autoregressive network read as a diffusion model: same weights, another mask."""

import pytest
import torch
from tiny import random_ids, tiny_model

from dlmlib.model.adapt import to_diffusion


def causal(**options):
    return tiny_model(attention="causal", shift_logits=True, **options)


@pytest.mark.parametrize("shift", [True, False])
def test_weights_are_kept_and_the_original_is_untouched(shift):
    model = causal()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = to_diffusion(model, shift)
    assert adapted.config.attention == "bidirectional"
    assert adapted.config.shift_logits == shift
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.zero_()
    assert model.config.attention == "causal"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_every_column_now_sees_to_its_right():
    model = causal(num_hidden_layers=1)
    ids = random_ids(2, 6)
    with torch.no_grad():
        old, new = model(ids).logits, to_diffusion(model)(ids).logits
        moved = ids.clone()
        moved[:, -1] = (moved[:, -1] + 1) % 12
        assert torch.equal(model(moved).logits[:, :-1], old[:, :-1])
        later = to_diffusion(model)(moved).logits
    assert (later[:, 2] - new[:, 2]).abs().max() > 1e-3  # now it sees to the right
    assert (new[:, 1:-1] - old[:, 1:-1]).abs().max() > 1e-3


def test_the_shift_moves_the_reading_by_one_column():
    model, ids = causal(), random_ids(2, 6)
    with torch.no_grad():
        shifted = to_diffusion(model)(ids).logits
        plain = to_diffusion(model, False)(ids).logits
    torch.testing.assert_close(shifted[:, 1:], plain[:, :-1])


def test_a_diffusion_model_is_refused():
    with pytest.raises(ValueError, match="attention"):
        to_diffusion(tiny_model())
