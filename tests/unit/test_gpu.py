"""The same answers on a GPU: run with `pytest -m gpu` where there is one."""

import pytest
import torch
from tiny import tiny_model

import dlmlib as dlm
from dlmlib.rl import methods
from dlmlib.rl.lora import add_lora
from dlmlib.rl.policy_gradient import GroupRelative, Rollouts
from dlmlib.rl.unmasking_policy import OrderHead
from dlmlib.tasks.grammar import Grammar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
MASK = 10
HOWS = {
    "blocks": dict(block_length=3, steps=5),
    "threshold": dict(commit=dlm.Threshold(0.3)),
    "factor": dict(commit=dlm.Factor(2.0)),
    "entropy": dict(commit=dlm.EntropyBound(0.5), propose="entropy"),
    "guided": dict(cfg_scale=0.7, steps=4),
    "prefix": dict(block_length=3, reuse=dlm.PrefixCache()),
    "dual": dict(block_length=3, reuse=dlm.DualCache()),
    "ahead": dict(reuse=dlm.Speculate(3)),
    "early": dict(steps=6, stop=dlm.EarlyCommit(gaps=(1.0, 0.5, 0.1))),
    "random": dict(propose="random", temperature=1.0, steps=4),
    "remask": dict(steps=6, revise=dlm.Remask("cap", 0.5), temperature=1.0),
}


@pytest.mark.parametrize("how", HOWS)
def test_decode_is_that_of_the_cpu(how):
    """Ragged rows with masks; draws come from one CPU generator on both devices."""
    model = tiny_model(1, mask_token_id=MASK).double()
    prompts = [[1, 2, MASK, 3], [4]]

    def run(model):
        draws = dlm.generator(0)
        return dlm.decode(
            model, prompts, length=6, generator=draws, trace=True, **HOWS[how]
        )

    here, there = run(model), run(model.to("cuda"))
    assert there.sequences.device.type == "cuda"
    assert torch.equal(here.sequences, there.sequences.cpu())
    assert torch.equal(here.trace.written, there.trace.written.cpu())
    assert here.forwards == there.forwards


@pytest.mark.parametrize("times", ["iid", "low_discrepancy", "l_of_L"])
def test_objective_is_that_of_the_cpu(times):
    model = tiny_model(2, mask_token_id=12).double()
    ids = torch.randint(12, (4, 9), generator=dlm.generator(0))
    noised = dlm.NELBO(12, times=times).corrupt({"input_ids": ids}, dlm.generator(1))
    here = dlm.NELBO(12, times=times)(model, noised)
    moved = {name: tensor.to("cuda") for name, tensor in noised.items()}
    there = dlm.NELBO(12, times=times)(model.to("cuda"), moved)
    assert torch.allclose(here, there.cpu())


@pytest.mark.parametrize(
    "name", ["diffu_grpo", "coupled_grpo", "trajectory", "one_state", "dcolt"]
)
def test_policy_gradients_are_those_of_the_cpu(name):
    """Two rollouts with adapters; everything random comes from one CPU generator."""

    def prompts(generator):
        ids = torch.randint(1, 9, (3, 4), generator=generator)
        ids[0, :2] = 0
        return {"input_ids": ids, "attention_mask": ids != 0}

    def run(device):
        model = tiny_model(3, mask_token_id=MASK).double().to(device)
        add_lora(model, rank=2).double()
        if name == "dcolt":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model.order_head = OrderHead(model.config).double().to(device)
        method = getattr(methods, name)()
        rollouts = Rollouts(
            model, prompts, lambda _, ids: (ids % 2).double().mean(1), method,
            length=4, group=4,
        )  # fmt: skip
        options = dict(steps=2 * method.epochs, lr=1e-2, precision="no", progress=False)
        dlm.fit(model, rollouts, GroupRelative(method), **options)
        return [p.detach().cpu() for p in model.parameters() if p.requires_grad]

    for here, there in zip(run("cpu"), run("cuda"), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-8)


def test_training_lowers_the_loss_in_bfloat16():
    grammar = Grammar()
    config = dlm.DLMConfig(
        vocab_size=len(grammar.tokenizer),
        mask_token_id=grammar.tokenizer.mask_token_id,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = dlm.DiffusionLM(config).to("cuda")
    result = dlm.fit(
        model,
        dlm.fresh_batches(grammar, 64),
        dlm.NELBO(config.mask_token_id),
        steps=200,
        lr=4e-3,
        progress=False,
    )
    losses = [entry["loss"] for entry in result.history]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_exact_arithmetic_follows_its_input():
    grammar = Grammar()
    ids = grammar.sample(8, dlm.generator(0))
    ids[:, 3] = grammar.tokenizer.mask_token_id
    here = grammar.denoiser()(ids).logits
    there = grammar.denoiser().to("cuda")(ids.to("cuda")).logits
    assert torch.allclose(here, there.cpu())
