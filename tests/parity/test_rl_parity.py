"""d1's and coupled-GRPO's log-probabilities on the official checkpoints."""

import random

import pytest
import torch

from dlmlib.rl.estimators import Coupled, MeanField, complementary
from dlmlib.rl.logprob import Views

KEEP = 12  # completion tokens in every call
ONE_FORWARD = ("p0.15", "p0.15_3iters", "p0.0", "p0.5")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ONE_FORWARD)
def test_mean_field_is_d1s(llada, name):
    """Given the prompt tokens it hid, one forward and no weights."""
    golden = llada.of(f"d1_llada/{name}")
    ids, noisy = golden["input_ids"].flatten(0, 1), golden["forward_inputs"][0]
    weight = torch.zeros(ids.shape)
    weight[:, -KEEP:] = 1
    views = Views(ids, noisy[:, None], weight[:, None])
    with torch.no_grad():
        found = MeanField().evaluate(llada.model, views)
    close(found.tokens[:, -KEEP:], golden["logps"].flatten(0, 1))
    assert found.forwards == 1


def test_mean_field_draws_what_d1_draws_without_prompt_noise(llada):
    golden = llada.of("d1_llada/p0.0")
    ids = golden["input_ids"][0]
    views = MeanField(0.0).draw(ids[:, :-KEEP], ids[:, -KEEP:], 500)
    assert torch.equal(views.canvas[:, 0], golden["forward_inputs"][0])


@pytest.mark.parametrize(("name", "seeds"), [("seed42", [42]), ("seeds3", [3, 4, 5])])
def test_coupled_is_diffucoders(dream, name, seeds):
    """Given its masks and ratios: three copies, their weights, and the average."""
    golden = dream.of(f"coupled_grpo_dream/{name}")
    copies = golden["forward_inputs"][0].view(len(seeds), 3, -1, 24)
    for number, seed in enumerate(seeds):
        ids, canvas = golden["input_ids"][number], copies[number].transpose(0, 1)
        t = torch.tensor([random.Random(seed).uniform(0.2, 0.8)])
        mask = canvas[:, 1, -KEEP:] == 500
        hidden, weight = complementary(mask, t)
        assert torch.equal(hidden, canvas[..., -KEEP:] == 500)
        prompt = weight.new_zeros(*weight.shape[:2], 24 - KEEP)
        views = Views(ids, canvas, torch.cat([prompt, weight], 2))
        with torch.no_grad():
            found = Coupled().evaluate(dream.model, views)
        close(found.tokens[:, -KEEP:], golden["logps"][:, number])
