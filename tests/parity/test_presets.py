"""Presets are the published programs: the goldens again, by name."""

import pytest
import torch

import dlmlib as dlm
from dlmlib.decoding import decode

FAST = {
    "generate": "none",
    "generate_with_prefix_cache": "prefix",
    "generate_with_dual_cache": "dual",
}


def same(golden, call, preset, length, **more):
    """The preset's answer is the program's."""
    arrays = golden.of(call)
    out = decode(golden.model, arrays["prompt"], length=length, **preset, **more)
    assert torch.equal(out.sequences, arrays["output"])


def test_llada(llada):
    for name in ("lowconf_blocks", "lowconf_uneven_split", "cfg_1.5"):
        args = llada.calls[f"llada_generate/{name}"]["args"]
        preset = dlm.presets.llada(
            args["steps"], args["block_length"], cfg_scale=args.get("cfg_scale", 0.0)
        )
        same(llada, f"llada_generate/{name}", preset, args["gen_length"])


@pytest.mark.parametrize("name", ["maskgit_plus_T0", "topk_margin_T0", "entropy_T0"])
def test_dream(dream, name):
    args = dream.calls[f"dream_generate/{name}"]["args"]
    preset = dlm.presets.dream(args["steps"], args["alg"])
    same(dream, f"dream_generate/{name}", preset, args["max_new_tokens"])


@pytest.mark.parametrize("program", FAST)
@pytest.mark.parametrize("rule", ["thr0.9", "thr0.5", "factor1", "factor2"])
def test_fast_dllm(llada, program, rule):
    args = llada.calls[f"fastdllm_llada/{program}/{rule}"]["args"]
    preset = dlm.presets.fast_dllm(
        args["block_length"], args.get("threshold"), args.get("factor"), FAST[program]
    )
    same(llada, f"fastdllm_llada/{program}/{rule}", preset, args["gen_length"])


def test_prophet(llada):
    args = llada.calls["prophet_llada/thr_mid"]["args"]
    start, gaps = args["answer_start_pos"], args["early_exit_thresholds"]
    preset = dlm.presets.prophet(
        args["steps"],
        args["block_length"],
        slice(start, start + 5),
        tuple(gaps.values()),
    )
    same(llada, "prophet_llada/thr_mid", preset, args["gen_length"])


def test_mdlm_reveals_a_binomial_number(llada):
    """The mean number of masks after the first of two steps is half of them."""
    prompt = torch.zeros(200, 1, dtype=torch.long)
    options = {"length": 16, "generator": dlm.generator(0), "trace": True}
    out = decode(llada.model, prompt, **dlm.presets.mdlm(2), **options)
    written = out.trace.written[0].sum(1).double()
    assert abs(written.mean() - 8) < 4 * (4 / 200) ** 0.5
    assert abs(written.var() - 4) < 4 * 4 * (2 / 199) ** 0.5


def test_remdm_fills_the_canvas(llada):
    preset = dlm.presets.remdm(12, "cap", 0.3, generator=dlm.generator(0))
    out = decode(llada.model, [[1, 2]], length=8, trace=True, **preset)
    assert out.trace.erased.any()
    assert not (out.sequences == llada.model.config.mask_token_id).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dlm.presets.dream(algorithm="best"), "algorithm='best': expected one"),
        (lambda: dlm.presets.fast_dllm(cache="both"), "cache='both': expected one"),
    ],
)
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
