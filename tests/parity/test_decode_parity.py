"""The official decoders' answers, token for token.

Compared are the canvas before every forward, the result and the number of forwards.
Left out, and why:

- seeded calls (`random_seeded`, `gumbel_T0.7_seeded`, `origin_*_seeded`,
  `entropy_T0.4_topp0.95_seeded`, `entropy_algtemp0.5_seeded`): upstream draws noise for
  the whole canvas from torch's global generator, we for the open positions only;
- Fast-dLLM Dream's cached calls and `nocache_thr0.5`: the program has rules of its own,
  see test_fastdllm_dream.py;
- `prompt_contains_mask`: upstream leaves the prompt's masks in the result;
- `cfg_without_attention_mask`: upstream crashes.
"""

import pytest
import torch

from dlmlib import presets
from dlmlib.decoding import (
    Blocks,
    DualCache,
    EarlyCommit,
    Even,
    Factor,
    PrefixCache,
    Scheduled,
    Threshold,
    decode,
)
from dlmlib.decoding.canvas import Canvas
from dlmlib.decoding.propose import Confidence, proposals, sample
from dlmlib.decoding.reuse import Reuse

LLADA = (
    "lowconf_single_block",
    "lowconf_uneven_split",
    "lowconf_blocks",
    "lowconf_blocks_onestep_each",
    "lowconf_full_steps",
    "lowconf_batch2",
    "lowconf_batch2_leftpad",
    "cfg_1.5",
    "cfg_0.5_batch2_leftpad",
    "logits_eos_inf",
    "confidence_eos_eot_inf",
)
CACHES = {
    "generate": Reuse,
    "generate_with_prefix_cache": PrefixCache,
    "generate_with_dual_cache": DualCache,
}
FASTDLLM = tuple(
    f"{program}/{rule}"
    for program in CACHES
    for rule in ("steps", "steps_uneven", "thr0.9", "thr0.5", "factor1", "factor2")
)
PROPHET = (
    "no_exit_default_thr",
    "thr_mid",
    "thr_low",
    "thr_late_only",
    "constraints",
    "single_block_gapscan",
    "cfg",
)
DREAM = (
    "maskgit_plus_T0",
    "topk_margin_T0",
    "entropy_T0",
    "entropy_steps_eq_len",
    "entropy_steps_gt_len",
    "maskgit_eps0.1",
    "entropy_batch2",
    "entropy_batch2_leftpad",
    "maskgit_infill_prompt_mask",
)
LLADA_LEFT_OUT = (
    "random_seeded",
    "gumbel_T0.7_seeded",
    "prompt_contains_mask",
    "cfg_without_attention_mask",
)
DREAM_LEFT_OUT = (
    "origin_T0_seeded",
    "origin_T0.4_topp0.95_seeded",
    "origin_T0.4_topk20_seeded",
    "entropy_T0.4_topp0.95_seeded",
    "entropy_algtemp0.5_seeded",
)
FASTDLLM_DREAM_LEFT_OUT = (
    "nocache_thr0.5",
    *(
        f"{cache}_{rule}"
        for cache in ("prefix", "dual")
        for rule in ("thr0.9", "thr0.5", "entropy_steps")
    ),
)
HELPERS = ("gumbel", "sel", "should_early_exit")
ORDER = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


def assert_same_path(out, canvases, output):
    """The trace passes through upstream's canvases and ends in its output."""
    assert torch.equal(out.sequences, output)
    assert out.trace.steps == len(canvases)
    for step, canvas in enumerate(canvases):
        assert torch.equal(out.trace.canvas(step), canvas), f"canvas before step {step}"
    assert torch.equal(out.trace.canvas(out.trace.steps), output)


@pytest.mark.parametrize("name", LLADA)
def test_llada_generate(llada, name):
    call = llada.calls[f"llada_generate/{name}"]
    golden, args = llada.of(f"llada_generate/{name}"), call["args"]
    guided = args.get("cfg_scale", 0.0)
    switches = {
        name: args[name]
        for name in ("logits_eos_inf", "confidence_eos_eot_inf")
        if name in args
    }
    out = decode(
        llada.model,
        golden["prompt"],
        length=args["gen_length"],
        attention_mask=golden.get("attention_mask"),
        trace=True,
        **presets.llada(
            args["steps"],
            args["block_length"],
            **switches,
            eos_token_id=call["eos_id_used"],
            eot_token_id=call["eot_id_used"],
            cfg_scale=guided,
        ),
    )
    rows = len(golden["prompt"])  # guidance appends the unconditional copies
    assert_same_path(out, golden["forward_inputs"][:, :rows], golden["output"])
    assert out.forwards == call["n_forwards"] * (2 if guided else 1)


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_guidance_needs_no_attention_mask(llada, scale):
    """Where upstream crashes, ours equals the call with a mask of ones."""
    prompt = llada.of("llada_generate/cfg_1.5")["prompt"]
    options = {"length": 16, "steps": 8, "block_length": 8, "cfg_scale": scale}
    without = decode(llada.model, prompt, **options)
    ones = decode(llada.model, prompt, attention_mask=prompt * 0 + 1, **options)
    assert torch.equal(without.sequences, ones.sequences)


def test_masks_in_the_prompt_are_filled(llada):
    """Upstream leaves two masks behind; ours fills them and keeps the other tokens."""
    call = llada.calls["llada_generate/prompt_contains_mask"]
    golden = llada.of("llada_generate/prompt_contains_mask")
    mask_id = llada.model.config.mask_token_id
    assert call["remaining_masks"] == 2
    out = decode(llada.model, golden["prompt"], length=16, steps=8, block_length=8)
    given = golden["prompt"] != mask_id
    assert not (out.sequences == mask_id).any()
    kept = out.sequences[:, : given.shape[1]][given]
    assert torch.equal(kept, golden["prompt"][given])


@pytest.mark.parametrize("name", FASTDLLM)
def test_fastdllm_llada(llada, name):
    """All caches and rules; every forward is fed the columns that upstream fed."""
    call = llada.calls[f"fastdllm_llada/{name}"]
    golden, args = llada.of(f"fastdllm_llada/{name}"), call["args"]
    rule = {"steps": args["steps"]}
    if "threshold" in args:
        rule = {"commit": Threshold(args["threshold"])}
    if "factor" in args:
        rule = {"commit": Factor(args["factor"], fast_dllm_tail=True)}
    reuse, fed = CACHES[name.partition("/")[0]](), []
    hook = llada.model.register_forward_pre_hook(
        lambda _, given: fed.append(given[0].clone())
    )
    out = decode(
        llada.model,
        golden["prompt"],
        length=args["gen_length"],
        block_length=args["block_length"],
        reuse=reuse,
        trace=True,
        **rule,
    )
    hook.remove()
    assert torch.equal(out.sequences, golden["output"])
    assert out.forwards == call["n_forwards"] == len(fed)
    for ours, theirs in zip(fed, golden["forward_inputs"], strict=True):
        assert torch.equal(ours, theirs[theirs >= 0][None])


@pytest.mark.parametrize("name", DREAM)
def test_dream_generate(dream, name):
    """Steps that commit nothing cost upstream a forward and us none."""
    call = dream.calls[f"dream_generate/{name}"]
    golden, args = dream.of(f"dream_generate/{name}"), call["args"]
    out = decode(
        dream.model,
        golden["prompt"],
        length=args["max_new_tokens"],
        propose=ORDER[args["alg"]],
        commit=Scheduled(args["steps"], args.get("eps", 1e-3)),
        attention_mask=golden.get("attention_mask"),
        trace=True,
    )
    paid = torch.tensor(call["committed_per_step"]) > 0
    assert_same_path(out, golden["forward_inputs"][paid], golden["output"])
    assert out.forwards == paid.sum()


def test_fastdllm_dream_uncached(dream):
    """At 0.9 upstream's cap on the tokens of a step never binds."""
    call = dream.calls["fastdllm_dream/nocache_thr0.9"]
    golden = dream.of("fastdllm_dream/nocache_thr0.9")
    out = decode(
        dream.model,
        golden["prompt"],
        length=call["args"]["max_new_tokens"],
        commit=Threshold(call["args"]["threshold"]),
        trace=True,
    )
    assert_same_path(out, golden["forward_inputs"], golden["output"])
    assert out.forwards == call["n_forwards"]


@pytest.mark.parametrize("name", PROPHET)
def test_prophet(llada, name):
    """Staged gaps on the answer's raw logits; constraints are tokens of the canvas."""
    call = llada.calls[f"prophet_llada/{name}"]
    golden, args = llada.of(f"prophet_llada/{name}"), call["args"]
    gaps = args.get("early_exit_thresholds", {"early": 7.5, "mid": 5.0, "late": 2.5})
    start, guided = args["answer_start_pos"], args.get("cfg_scale", 0.0)
    canvas = golden["forward_inputs"][0, :1]  # guidance appends a blind copy
    out = decode(
        llada.model,
        canvas,
        where=Blocks(args["block_length"], start=golden["prompt"].shape[1]),
        commit=Even(args["steps"]),
        stop=EarlyCommit(slice(start, start + 5), tuple(gaps.values())),
        cfg_scale=guided,
        trace=True,
    )
    assert_same_path(out, golden["forward_inputs"][:, :1], golden["output"])
    assert out.forwards == call["n_forwards"] * (2 if guided else 1)


def test_every_call_is_compared_or_left_out(llada, dream):
    """Compared and left-out calls together are all the recorded ones."""
    programs = {
        "llada_generate": (llada, LLADA, LLADA_LEFT_OUT),
        "fastdllm_llada": (llada, FASTDLLM, ()),
        "prophet_llada": (llada, PROPHET, ()),
        "dream_generate": (dream, DREAM, DREAM_LEFT_OUT),
        "fastdllm_dream": (dream, ("nocache_thr0.9",), FASTDLLM_DREAM_LEFT_OUT),
    }
    for program, (golden, compared, left_out) in programs.items():
        calls = [key for key in golden.calls if key.startswith(f"{program}/")]
        names = {key.removeprefix(f"{program}/") for key in calls}
        helpers = {n for n in names if n in HELPERS or n.startswith("num_transfer")}
        assert not set(compared) & set(left_out)
        assert names - helpers == {*compared, *left_out}


@pytest.mark.parametrize("index", range(5))
def test_even_split(llada, index):
    """`Even` hands out upstream's get_num_transfer_tokens."""
    golden = llada.of(f"llada_generate/num_transfer_tokens_{index}")
    steps = llada.calls[f"llada_generate/num_transfer_tokens_{index}"]["args"]["steps"]
    masked = golden["mask_index"]
    canvas = Canvas.start(masked.long(), 0, mask_token_id=1)
    left, commit = masked.sum(1), Even(steps)
    for step in range(steps):
        canvas.phase_step = torch.full_like(left, step)
        quota = commit.quota(left, canvas, torch.full_like(left, steps), None)
        assert torch.equal(quota, golden["result"][:, step])
        left = left - quota
    assert not left.any()


@pytest.mark.parametrize("tau", [0.3, 0.6, 0.9])
def test_threshold_selection(llada, tau):
    """`Threshold` keeps the positions of upstream's get_transfer_index."""
    golden = llada.of("fastdllm_llada/sel")
    open_ = golden["mask_index"]
    no_mask_id = golden["logits"].shape[-1]
    proposal = proposals(
        Confidence(), golden["logits"][open_], open_.nonzero()[:, 1], no_mask_id
    ).spread(open_)
    keep = Threshold(tau)(proposal, open_, torch.tensor([1]))
    assert torch.equal(keep, golden[f"threshold_{tau}"])


def test_gumbel_draws(llada):
    """Given upstream's uniforms, our draw is the arg max of its noisy logits."""
    golden = llada.of("llada_generate/gumbel")
    temperature = llada.calls["llada_generate/gumbel"]["args"]["temperature"]
    generator = torch.Generator().manual_seed(1234)  # upstream's global seed
    ours = sample(golden["logits"].flatten(0, 1), temperature, generator)
    assert torch.equal(ours, golden["result"].argmax(-1).flatten())
