"""The network: what it computes, who sees whom, and what it saves."""

import copy
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import by_hand, random_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel

from dlmlib.decoding import decode
from dlmlib.diffusion import NELBO
from dlmlib.model import DiffusionLM, DLMConfig

T = 7
VARIANTS = {
    "bidirectional": {},
    "grouped": {"num_key_value_heads": 2, "qkv_bias": True, "rope_theta": 1e6},
    "tied": {"tie_word_embeddings": True},
    "causal": {"attention": "causal"},
    "causal_shift": {"attention": "causal", "shift_logits": True},
    "block": {"attention": "block_causal", "block_length": 3},
    "dream": {"shift_logits": True, "num_key_value_heads": 1, "qkv_bias": True},
}


def visible(config: DLMConfig, length: int = T) -> torch.Tensor:
    """[T, T] bool: whether the state of column i may depend on token j."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if config.attention == "bidirectional":
        return torch.ones(length, length, dtype=torch.bool)
    if config.attention == "causal":
        return j <= i
    return j // config.block_length <= i // config.block_length


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.fixture(params=VARIANTS, name="model")
def any_model(request):
    return tiny_model(**VARIANTS[request.param])


# What it computes


@torch.no_grad()
def test_equals_the_forward_written_out(model):
    """Complex rotations and an explicit softmax, in float64, give the same logits.

    Not closer than 2e-6, since the library keeps rotary angles in float32.
    """
    model = model.double()
    with torch.random.fork_rng():  # biases start at zero: give them values
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    ids = random_ids(2, T)
    for row, ours in zip(ids, model(ids).logits, strict=True):
        theirs, _ = by_hand(model, row, visible=visible(model.config))
        close(ours, theirs, 2e-6)


@torch.no_grad()
def test_grouped_equals_repeated_heads():
    grouped = tiny_model(num_key_value_heads=2, qkv_bias=True)
    full = tiny_model(seed=1, qkv_bias=True)
    weights = grouped.state_dict()
    for name in [key for key in weights if "k_proj" in key or "v_proj" in key]:
        heads = weights[name].unflatten(0, (2, -1))
        weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    ids = random_ids(2, T)
    close(full(ids).logits, grouped(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("shift", [1, 17, 200])
def test_only_relative_positions_matter(model, shift):
    ids = random_ids(1, T)
    moved = shift + torch.arange(T)[None]
    close(model(ids, position_ids=moved).logits, model(ids).logits, 2e-5)


@torch.no_grad()
def test_positions_do_matter(model):
    """Order is seen: another spacing gives other logits."""
    ids = random_ids(1, T)
    spread = model(ids, position_ids=3 * torch.arange(T)[None]).logits
    assert (spread - model(ids).logits)[:, -1].abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_precisions(model, dtype):
    ids = random_ids(2, T)
    reference = model(ids).logits
    other = copy.deepcopy(model).to(dtype)(ids).logits
    assert other.dtype == dtype
    error = (other.float() - reference).norm() / reference.norm()
    assert error < (1e-5 if dtype == torch.float64 else 0.05)


# Who sees whom


def influence(model, ids) -> torch.Tensor:
    """[T, T] bool: whether logits[:, i] have a gradient in the embedding of token j."""
    seen = {}

    def keep(module, args, output):
        output.retain_grad()
        seen["embedding"] = output

    hook = model.get_input_embeddings().register_forward_hook(keep)
    logits = model(ids).logits
    hook.remove()
    rows = []
    for i in range(ids.shape[1]):
        seen["embedding"].grad = None
        # Squared, as the plain sum over a normalised state may cancel.
        logits[0, i].square().sum().backward(retain_graph=True)
        rows.append(seen["embedding"].grad[0].abs().amax(-1) > 1e-9)
    return torch.stack(rows)


def test_gradients_flow_exactly_where_they_should(model):
    """State i sees j as the mask says; with the shift, logits i are of state i - 1."""
    may_see = visible(model.config)
    if model.config.shift_logits:
        may_see = torch.cat([may_see[:1], may_see[:-1]])
    assert torch.equal(influence(model, random_ids(1, T)), may_see)


@torch.no_grad()
def test_next_token_model_does_not_see_its_target():
    """logits[:, i] of the autoregressive twin ignore the tokens from i on, for i > 0.

    Logits 0 have no left neighbour and repeat the state of token 0: nothing may score
    or train on them.
    """
    model = tiny_model(attention="causal", shift_logits=True)
    ids = random_ids(1, T)
    other = (ids + 1) % 12
    for i in range(1, T):
        changed = torch.cat([ids[:, :i], other[:, i:]], dim=1)
        moved = (model(changed).logits - model(ids).logits)[0].abs().amax(-1)
        assert not moved[1 : i + 1].any()
        assert (moved[i + 1 :] > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "block"])
@pytest.mark.parametrize("counted", [False, True])
def test_left_padding_changes_nothing(variant, counted):
    """A padded row equals the row alone; what the padding says is never read."""
    model = tiny_model(**VARIANTS[variant])
    row = random_ids(1, 5)
    for pads in (1, 3):
        real = torch.arange(5 + pads) >= pads
        mask = torch.stack([torch.ones_like(real), real]).long()
        options = {"attention_mask": mask}
        if counted:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        several = []
        for filler in (0, 7):
            left = torch.full((1, pads), filler)
            ids = torch.cat([random_ids(1, 5 + pads, 3), torch.cat([left, row], 1)])
            several.append(model(ids, **options).logits)
        first = 1 if model.config.shift_logits else 0  # predicted from the padding
        close(several[0][1, pads + first :], model(row).logits[0, first:])
        close(several[0][0], model(ids[:1]).logits[0])
        assert torch.equal(several[0][1, pads + first :], several[1][1, pads + first :])
        assert several[0].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("pads", [1, 2, 4])
def test_left_padding_does_not_move_the_blocks(pads):
    model = tiny_model(**VARIANTS["block"])
    row = random_ids(1, 5)
    ids = torch.cat([torch.zeros(1, pads).long(), row], 1)
    mask = torch.arange(5 + pads)[None] >= pads
    close(model(ids, attention_mask=mask).logits[:, pads:], model(row).logits)


@torch.no_grad()
def test_rows_do_not_mix(model):
    ids = random_ids(4, T)
    together = model(ids).logits
    for row in range(4):
        close(together[row], model(ids[row : row + 1]).logits[0])


# Logits of some positions only


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_last_block_computes_what_is_asked_for(variant, padded):
    """Of columns 3 to 5, and the one before where logits are shifted; no others."""
    model = tiny_model(**VARIANTS[variant]).double()
    ids, wanted = random_ids(2, T), torch.zeros(2, T, dtype=torch.bool)
    wanted[0, 3], wanted[1, [4, 5]] = True, True
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, :3] = 0 if padded else 1  # the wanted column is the first real one
    widths = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, x: widths.append(x[0].shape[1]))
    with torch.no_grad():
        ours = model(ids, mask, logit_positions=wanted).logits
        asked, widths[:] = list(widths), []
        kept = model(ids, mask, logit_positions=wanted, output_hidden_states=True)
        expected = model(ids, mask).logits[wanted]
    assert asked == [T, 3 + model.config.shift_logits]
    assert set(widths) == {T}  # states that are kept are whole
    close(ours, expected)
    close(kept.logits, expected)
    none = model(ids, mask, logit_positions=torch.zeros_like(wanted)).logits
    assert none.shape == (0, model.config.vocab_size)


@torch.no_grad()
@pytest.mark.parametrize("chosen", ["some", "none", "all"])
def test_logit_positions_select(model, chosen):
    ids = random_ids(3, T)
    generator = torch.Generator().manual_seed(2)
    some = torch.rand(ids.shape, generator=generator) < 0.4
    wanted = {"some": some, "none": some & False, "all": some | True}[chosen]
    expected = model(ids).logits[wanted]
    assert expected.shape == (wanted.sum(), model.config.vocab_size)
    close(model(ids, logit_positions=wanted).logits, expected)
    flat = wanted.flatten().nonzero()[:, 0]
    close(model(ids, logit_positions=flat).logits, expected)
    backwards = model(ids, logit_positions=flat.flip(0)).logits
    close(backwards, expected.flip(0))


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor made within."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize("shift", [False, True])
def test_nothing_of_batch_by_length_by_vocabulary(shift):
    """Neither a forward, the objective's gradient nor a decode makes B x T x V."""
    vocab, rows, columns = 2000, 4, 24
    model = tiny_model(
        vocab_size=vocab, hidden_size=8, mask_token_id=1999, shift_logits=shift
    )
    ids = random_ids(rows, columns, below=1999)
    full = rows * columns * vocab
    states = []
    model.lm_head.register_forward_pre_hook(lambda _, x: states.append(x[0].shape))

    with Largest() as used, torch.no_grad():
        model(ids)
    assert used.entries == full  # the measure sees what it should
    some = torch.zeros_like(ids, dtype=torch.bool)
    some[:, -2:] = True
    with Largest() as used, torch.no_grad():
        model(ids, logit_positions=some)
    assert used.entries < full // 4 and states[-1] == (2 * rows, 8)

    generator = torch.Generator().manual_seed(0)
    objective = NELBO(model.config.mask_token_id)
    noised = objective.corrupt({"input_ids": ids, "maskable": some}, generator)
    hidden = int((noised["noisy_ids"] != ids).sum())
    assert hidden > 0
    with Largest() as used:
        objective(model, noised).sum().backward()
    assert used.entries < full // 4 and states[-1] == (hidden, 8)

    del states[:]
    with Largest() as used:
        decode(model, ids[:, :-2], length=2)
    assert used.entries < full // 4
    assert [shape[0] for shape in states] == [2 * rows, rows]


def test_attention_mask_of_another_shape():
    model, ids = tiny_model(), random_ids(2, T)
    message = r"attention_mask.shape=\(2, 5\): expected \(2, 7\)"
    with pytest.raises(ValueError, match=message):
        model(ids, attention_mask=torch.ones(2, 5))


# Training


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6")
def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids = random_ids(2, T)

    def gradients():
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable()
    calls = []
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients()
    hook.remove()
    assert len(calls) == 2  # forward, and again on the way back
    assert sum(gradient.abs().sum() for gradient in plain) > 1
    for ours, theirs in zip(recomputed, plain, strict=True):
        close(ours, theirs, 1e-6)


def test_initial_weights():
    """Normal with the config's spread, norms one, biases zero."""
    model = tiny_model(
        hidden_size=128, vocab_size=500, initializer_range=0.05, qkv_bias=True
    )
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
        elif name.endswith("bias"):
            assert (weight == 0).all()
        else:
            assert abs(weight.std() / 0.05 - 1) < 0.05, name
            assert abs(weight.mean()) < 0.05 * 5 / weight.numel() ** 0.5, name


# Saving and loading


@torch.no_grad()
def test_save_and_load_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.json", "model.safetensors"}  # and so no pickle
    ids = random_ids(2, T)
    for kind in (DiffusionLM, AutoModel):
        loaded = kind.from_pretrained(tmp_path)
        assert isinstance(loaded, DiffusionLM) and not loaded.training
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
        for (name, ours), theirs in zip(
            loaded.state_dict().items(), model.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DLMConfig)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_survives_saving(dtype, tmp_path):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = DiffusionLM.from_pretrained(tmp_path)
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_ties_survive_saving(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    for one in (model, DiffusionLM.from_pretrained(tmp_path)):
        embedding = one.get_input_embeddings().weight
        head = one.get_output_embeddings().weight
        assert (head is embedding) is tied
        with torch.no_grad():
            embedding[3] += 1.0
        assert torch.equal(head[3], embedding[3]) is tied


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises((SafetensorError, ValueError), match=r"header|incomplete"):
            DiffusionLM.from_pretrained(folder)


def test_garbled_header(folder):
    file = folder / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[8:40] = bytes(32)
    file.write_bytes(whole)
    with pytest.raises((SafetensorError, ValueError), match="invalid JSON in header"):
        DiffusionLM.from_pretrained(folder)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "change", [{"hidden_size": 64}, {"vocab_size": 14}, {"intermediate_size": 64}]
)
def test_weights_of_another_shape(folder, change):
    edit_config(folder, **change)
    with pytest.raises((RuntimeError, ValueError), match="mismatched"):
        DiffusionLM.from_pretrained(folder)


INCOMPLETE = "a checkpoint that lacks tensors is filled with random ones"


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"qkv_bias": True}])
def test_fewer_tensors_than_the_config_asks_for(folder, change):
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=r"model\.layers"):
        DiffusionLM.from_pretrained(folder)


def test_more_tensors_than_the_config_asks_for(folder):
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"model\.layers\.1"):
        DiffusionLM.from_pretrained(folder)


def test_missing_tensor(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        DiffusionLM.from_pretrained(folder)


def test_missing_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        DiffusionLM.from_pretrained(folder)


def test_pickles_are_never_loaded(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        DiffusionLM.from_pretrained(folder)


def test_a_copied_folder_is_the_same_model(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, other)
    ids = random_ids(1, T)
    with torch.no_grad():
        ours = DiffusionLM.from_pretrained(other)(ids).logits
        assert torch.equal(ours, DiffusionLM.from_pretrained(folder)(ids).logits)


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size=0: expected an integer >= 1"),
        ({"hidden_size": 0}, r"hidden_size=0: expected an integer >= 1"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0: expected an integer >= 1"),
        ({"intermediate_size": -1}, r"intermediate_size=-1: expected an integer >= 1"),
        ({"num_attention_heads": 0}, r"num_attention_heads=0: expected an integer"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads=0: expected an integer"),
        ({"num_attention_heads": 5}, r"hidden_size=32: expected a multiple of .* 10"),
        ({"hidden_size": 36}, r"hidden_size=36: expected a multiple of .* 8"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3: expected divides 4"),
        ({"attention": "sideways"}, r"attention='sideways': expected in .*causal"),
        ({"block_length": 0}, r"block_length=0: expected >= 1"),
    ],
)
def test_impossible_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**options)


def test_defaults_fill_key_value_heads():
    config = DLMConfig(hidden_size=48, num_attention_heads=6)
    assert config.num_key_value_heads == 6 and config.head_dim == 8
