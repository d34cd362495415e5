"""The official networks and losses: logits, states and values as upstream computed."""

import pytest
import torch
import torch.nn.functional as F

from dlmlib.diffusion import NELBO
from dlmlib.diffusion.masking import named_schedule
from dlmlib.model import DiffusionLM

FIRST_FORWARD = 2e-5
# Logits reach 31. A float64 run differs from these float32 goldens by up to 4.8e-5,
# which is their own rounding: nothing can be asked below it.
ROUNDING = 5e-5


def close(ours, theirs, atol=ROUNDING):
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=atol)


def in_precision(model, dtype):
    """The same network with its weights in `dtype`."""
    wide = DiffusionLM(model.config).to(dtype).eval()
    wide.load_state_dict(model.state_dict())
    return wide


def padded_call(arrays, rows: int, columns: int):
    """Attention mask [B, T] over prompt and answer, and positions, as upstream's."""
    mask = arrays.get("attention_mask")
    if mask is None:
        return None, {}
    mask = F.pad(mask, (0, columns - mask.shape[1]), value=1)
    mask = mask.repeat(rows // len(mask), 1)  # guidance doubles the batch
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return mask.bool(), {"attention_mask": mask, "position_ids": positions}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_logits_and_states(name, dtype, request):
    """Logits, block inputs and the final state of a whole batch."""
    golden_set = request.getfixturevalue(name)
    golden = golden_set.of(f"{name}_logits/plain")
    model = in_precision(golden_set.model, dtype)
    out = model(golden["input_ids"], output_hidden_states=True)
    assert out.logits.dtype == dtype
    close(out.logits, aligned(name, golden["logits"]))
    states = [golden[f"hidden_{layer}"] for layer in range(3)]
    for ours, theirs in zip(out.hidden_states, states, strict=True):
        close(ours, theirs, 1e-5)


def aligned(name, logits):
    """Upstream's logits with row i about token i: Dream's are about the next one."""
    if name == "llada":
        return logits
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_left_padding(name, request):
    """A padded row equals upstream's padded row and upstream's row alone.

    LLaDA leaves positions unshifted under padding, Dream counts from the first token;
    to rotary positions it is the same.
    """
    golden_set = request.getfixturevalue(name)
    golden = golden_set.of(f"{name}_logits/leftpad")
    mask = golden["attention_mask"]
    counted = (mask.cumsum(1) - 1).clamp_min(0)
    real = mask.bool()
    assert not real[1].all()
    if name == "dream":  # the first real token is predicted by padding
        real = real & F.pad(real[:, :-1], (1, 0), value=True)
    start = int((~mask[1].bool()).sum())
    alone = aligned(name, golden["row1_unpadded_logits"])[0]
    for options in ({}, {"position_ids": counted}):
        ours = golden_set.model(golden["input_ids"], attention_mask=mask, **options)
        close(ours.logits[real], aligned(name, golden["logits"])[real])
        close(ours.logits[1][real[1]], alone[real[1][start:]])


FIRST = ("forward_logits_0", "shifted_logits_0")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_first_forward_of_every_call(name, request):
    """Every distinct first forward of the decoders, padded and guided ones included."""
    golden_set = request.getfixturevalue(name)
    keys = [key for key in golden_set.arrays if key.endswith(FIRST)]
    assert len(keys) >= 5
    for key in keys:
        call, kind = key.rsplit("/", 1)
        arrays = golden_set.of(call)
        ids = arrays["forward_inputs"][0]
        real, options = padded_call(arrays, *ids.shape)
        ours, theirs = golden_set.model(ids, **options).logits, arrays[kind]
        assert ours.shape == theirs.shape, key
        if real is None:
            real = torch.ones_like(ids, dtype=torch.bool)
        elif kind == "shifted_logits_0":  # the first token is predicted by padding
            real = real & F.pad(real[:, :-1], (1, 0), value=True)
        close(ours[real], theirs[real], FIRST_FORWARD)


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_llada_loss(llada, kind, seed):
    """LLaDA's loss from our nats, given upstream's noise.

    Pre-training divides by B L, fine-tuning by each row's answer length; the weight of
    the linear schedule is 1 / p_mask in both.
    """
    golden = llada.of(f"llada_loss/{kind}_{seed}")
    clean, noisy = golden["input_ids"], golden["noisy"]
    masked = golden["p_mask"][:, 0]
    weight = named_schedule("linear").weight(masked)
    torch.testing.assert_close(weight, 1 / masked)
    noised = {"input_ids": clean, "noisy_ids": noisy, "weight": weight}
    nats = NELBO(llada.model.config.mask_token_id)(llada.model, noised)
    tokens = torch.full((len(clean),), clean.shape[1])
    if kind == "sft":
        tokens = tokens - golden["prompt_lengths"]
        start = golden["prompt_lengths"][:, None]
        prompt = torch.arange(clean.shape[1]) < start
        assert torch.equal(noisy[prompt], clean[prompt])
    loss = (nats / tokens).mean().double()
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("call", ["mc32_b8", "mc1"])
def test_llada_log_likelihood(llada, call):
    """The l-of-L estimate of log p(answer | prompt), given upstream's corruptions.

    `mc16_b4_cfg` is left out: scoring with guidance is not an option here.
    """
    shared = llada.of("llada_loglik")
    golden = llada.of(f"llada_loglik/{call}")
    noisy = golden["forward_inputs"].flatten(0, 1)
    clean = torch.cat([shared["prompt"], shared["answer"]]).expand(len(noisy), -1)
    length = len(shared["answer"])
    mask_id = llada.model.config.mask_token_id
    count = (noisy == mask_id).sum(1)
    assert not (noisy == mask_id)[:, : len(shared["prompt"])].any()
    noised = {"input_ids": clean, "noisy_ids": noisy, "weight": length / count}
    nats = NELBO(mask_id, times="l_of_L")(llada.model, noised)
    value = -nats.double().mean()
    torch.testing.assert_close(value, golden["value"], rtol=1e-6, atol=0)


def test_llada_strata_are_ours(llada):
    """Both estimators spread l evenly over the batch: neighbours are L / B apart."""
    shared = llada.of("llada_loglik")
    golden = llada.of("llada_loglik/mc32_b8")
    mask_id = llada.model.config.mask_token_id
    length, rows = len(shared["answer"]), golden["forward_inputs"].shape[1]
    ids = torch.cat([shared["prompt"], shared["answer"]]).expand(rows, -1)
    maskable = torch.arange(ids.shape[1]) >= len(shared["prompt"])
    batch = {"input_ids": ids, "maskable": maskable.expand_as(ids)}
    generator = torch.Generator().manual_seed(0)
    objective = NELBO(mask_id, times="l_of_L")
    ours = [objective.corrupt(batch, generator)["noisy_ids"] for _ in range(50)]
    for noisy in [*golden["forward_inputs"], *ours]:
        count = (noisy == mask_id).sum(1).sort().values
        gaps = torch.cat([count.diff(), count[:1] + length - count[-1:]])
        assert set(gaps.tolist()) <= {length // rows, length // rows + 1}
        assert gaps.sum() == length and count[0] >= 1 and count[-1] <= length
