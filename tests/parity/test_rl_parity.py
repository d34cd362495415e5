"""Official answers of d1, coupled-GRPO and LLaDOU on their checkpoints."""

import random

import pytest
import torch
from conftest import GOLDENS, Golden

import dlmlib as dlm
from dlmlib.rl.estimators import Coupled, MeanField, complementary
from dlmlib.rl.logprob import Views
from dlmlib.rl.unmasking_policy import Learned, OrderHead

KEEP = 12  # completion tokens in every call
ONE_FORWARD = ("p0.15", "p0.15_3iters", "p0.0", "p0.5")


@pytest.fixture(scope="module")
def lladou() -> Golden:
    return Golden.load("lladou_llada_a")


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


@pytest.mark.parametrize("time", ["0.0", "0.25", "0.75"])
def test_order_head_is_lladous(lladou, time):
    golden = lladou.of("lladou/policy")
    head = OrderHead.from_pretrained(GOLDENS / "lladou_llada_a", lladou.model.config)
    with torch.no_grad():
        found = head(
            golden["hidden_last"],
            torch.full((2,), float(time)),
            golden["mask_index"],
            golden["current_block"],
        )
    close(found, golden[f"logits_t{time}"])


def test_a_checkpoint_with_an_order_head_loads_as_the_network_alone(lladou):
    golden = lladou.of("lladou/policy")
    with torch.no_grad():
        out = lladou.model(golden["input_ids"], output_hidden_states=True)
    close(out.logits, golden["token_logits"])
    close(out.hidden_states[-1][:, 8:], golden["hidden_last"])


@pytest.mark.parametrize(
    ("name", "steps", "block"), [("sample_infer_b8", 8, 8), ("sample_infer_b16", 4, 16)]
)
def test_learned_order_decodes_as_lladou(lladou, name, steps, block):
    """Token for token at every step, with equal forwards."""
    golden = lladou.of(f"lladou/{name}")
    head = OrderHead.from_pretrained(GOLDENS / "lladou_llada_a", lladou.model.config)
    out = dlm.decode(
        lladou.model,
        golden["prompt"],
        length=16,
        steps=steps,
        block_length=block,
        propose=Learned(head.requires_grad_(False)),
        trace=True,
    )
    assert out.forwards == steps
    for step, expected in enumerate(golden["trajectory_outputs"]):
        assert torch.equal(out.trace.canvas(step + 1), expected)
