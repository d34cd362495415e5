"""LoRA: exact low-rank updates, a reference for free, small training states."""

import pytest
import torch
from tiny import tiny_model
from toys import gen

import dlmlib as dlm
from dlmlib.rl import methods
from dlmlib.rl.estimators import MeanField
from dlmlib.rl.lora import WithoutLora, add_lora
from dlmlib.rl.policy_gradient import GroupRelative, Rollouts
from dlmlib.training.checkpoints import load_tensors
from dlmlib.training.fit import STATE, fit

MASK = 3


def adapted(rank: int = 2, **options):
    """A tiny model and its twin with adapters."""
    shape = dict(vocab_size=8, mask_token_id=MASK)
    return tiny_model(0, **shape), add_lora(
        tiny_model(0, **shape), rank, 4.0, **options
    )


def canvas():
    return torch.randint(4, 8, (3, 6), generator=gen(1))


def shaken(model, size: float = 0.1):
    """Adapters away from zero, as after some training."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora" in name:
                noise = torch.randn(parameter.shape, generator=gen(index))
                parameter += size * noise
    return model


def rollouts(model, method, **options):
    def prompts(generator):
        return torch.randint(4, 8, (2, 2), generator=generator)

    def reward(prompt, completion):
        return (completion % 2).float().mean(1)

    return Rollouts(model, prompts, reward, method, length=3, group=4, **options)


def test_nothing_changes_before_the_first_update():
    base, model = adapted()
    assert torch.equal(base(canvas()).logits, model(canvas()).logits)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)


def test_an_adapter_is_a_low_rank_update():
    """W + (alpha / rank) B A in place of W gives the same logits."""
    base, model = adapted(rank=2, targets=("q_proj", "down_proj"))
    shaken(model)
    tensors = dict(model.named_parameters())
    merged = 0
    with torch.no_grad():
        for name, weight in base.named_parameters():
            prefix = name.removesuffix(".weight")
            up = tensors.get(f"{prefix}.lora_B.default.weight")
            if up is not None:
                weight += 4.0 / 2 * up @ tensors[f"{prefix}.lora_A.default.weight"]
                merged += 1
    assert merged == 2 * base.config.num_hidden_layers
    torch.testing.assert_close(base(canvas()).logits, model(canvas()).logits)


def test_the_reference_is_the_model_without_them():
    base, model = adapted()
    shaken(model)
    reference = WithoutLora(model)
    before = model(canvas()).logits
    assert torch.equal(reference(canvas()).logits, base(canvas()).logits)
    assert torch.equal(model(canvas()).logits, before), "switched on again"
    prompt, answer = canvas().split([2, 4], 1)
    for estimator in (MeanField(0.0),):
        mine = estimator(reference, prompt, answer, gen(0)).total
        torch.testing.assert_close(mine, estimator(base, prompt, answer, gen(0)).total)
    with pytest.raises(ZeroDivisionError):
        model.register_forward_pre_hook(lambda *_: 1 / 0)
        reference(canvas())
    model._forward_pre_hooks.clear()
    assert torch.equal(model(canvas()).logits, before), "even after an error"


def test_decoding_and_policy_gradients_run_unchanged(tmp_path):
    """The KL starts at 0, only adapters move, and the state holds only them."""
    base, model = adapted()
    method = methods.diffu_grpo(epochs=2, kl=0.1)
    source = rollouts(model, method)
    assert isinstance(source.reference, WithoutLora), "no copy of the model"
    first = source(gen(3))
    torch.testing.assert_close(first["reference"], first["old"])
    fit(
        model,
        rollouts(model, method),
        GroupRelative(method),
        steps=4,
        lr=1e-2,
        weight_decay=0.0,
        checkpoint=tmp_path,
        progress=False,
    )
    held = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, held[name.replace(".base_layer", "")]), name
    assert not torch.equal(model(canvas()).logits, base(canvas()).logits)
    tensors, _ = load_tensors(tmp_path / STATE)
    stored = [name for name in tensors if name.startswith("model.")]
    assert stored and all("lora" in name for name in stored)
    out = dlm.decode(model, canvas()[:, :2], length=3)
    assert out.sequences.shape == (3, 5)


def test_an_interrupted_run_ends_the_same(tmp_path):
    method = methods.trajectory(kl=0.05)
    common = dict(steps=4, lr=1e-2, progress=False, save_every=1)
    _, whole = adapted()
    fit(whole, rollouts(whole, method), GroupRelative(method), **common)
    _, model = adapted()
    source, calls = rollouts(model, method), []

    def failing(generator):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return source(generator)

    with pytest.raises(KeyboardInterrupt):
        fit(model, failing, GroupRelative(method), checkpoint=tmp_path, **common)
    _, again = adapted()
    source = rollouts(again, method)
    fit(again, source, GroupRelative(method), checkpoint=tmp_path, **common)
    for (name, one), two in zip(
        whole.named_parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_adapters_are_saved_in_pefts_format(tmp_path):
    base, model = adapted()
    shaken(model).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    base.load_adapter(str(tmp_path))
    assert torch.equal(base(canvas()).logits, model(canvas()).logits)


def test_wrong_arguments():
    base, _ = adapted()
    with pytest.raises(ValueError, match=r"rank=0.*>= 1"):
        add_lora(base, 0)
    with pytest.raises(ValueError, match=r"targets=\['query'\]"):
        add_lora(base, 2, targets=("q_proj", "query"))
    assert all(p.requires_grad for p in base.parameters()), "left as it was"
    with pytest.raises(ValueError, match="adapters"):
        WithoutLora(base)
