"""memory.py: the plan against the network, and the back-off."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from dlmlib import gauges
from dlmlib import memory as mem
from dlmlib.model import DiffusionLM, DLMConfig

SMALL = DLMConfig(
    vocab_size=10,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=12,
)


# The published shapes, as plain fields.
LLADA = SimpleNamespace(
    vocab_size=126464,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    intermediate_size=12288,
    qkv_bias=False,
    tie_word_embeddings=False,
)
DREAM = SimpleNamespace(
    vocab_size=152064,
    hidden_size=3584,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18944,
    qkv_bias=True,
    tie_word_embeddings=False,
)


# ---- memory planned


def test_published_sizes():
    assert mem.count_parameters(LLADA) == 8_015_581_184
    assert mem.count_parameters(DREAM) == 7_615_616_512


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("num_key_value_heads", [1, 4])
def test_count_is_that_of_the_network(
    qkv_bias, tie_word_embeddings, num_key_value_heads
):
    config = DLMConfig(
        qkv_bias=qkv_bias,
        tie_word_embeddings=tie_word_embeddings,
        num_key_value_heads=num_key_value_heads,
        num_hidden_layers=3,
    )
    real = sum(p.numel() for p in DiffusionLM(config).parameters())
    assert mem.count_parameters(config) == real


def test_plan_by_hand():
    # D 8, K 4, I 12, V 10, L 2; B 3, T 5 -> 15 positions; bfloat16 is 2 bytes
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 12 + 2 * 8
    plan = mem.memory_plan(SMALL, batch=3, length=5, cache=True)
    assert plan.weights == 2 * (2 * 10 * 8 + 2 * layer + 8)
    assert plan.activations == 15 * max((24 + 36) * 2, (24 + 4) * 2 + 160)
    assert plan.logits == 15 * 10 * 4
    assert plan.cache == 2 * 2 * 4 * 15 * 2
    parts = plan.weights, plan.activations, plan.logits, plan.cache
    assert plan.total == sum(parts)


def test_plan_for_chosen_positions_and_other_dtype():
    wide = mem.memory_plan(SMALL, batch=3, length=5, dtype=torch.float32)
    few = mem.memory_plan(SMALL, batch=3, length=5, logit_positions=2)
    assert wide.weights == 2 * few.weights
    assert wide.activations == 15 * max((24 + 36) * 4, (24 + 4) * 4 + 160)
    assert (few.logits, few.cache) == (2 * 10 * 4, 0)


def test_cache_of_the_plan_is_that_of_the_network():
    # LLaDA at 4096 tokens: 2 x 32 layers x 4096 x 4096 x 2 bytes = 2 GiB exactly
    plan = mem.memory_plan(LLADA, length=4096, cache=True)
    assert plan.cache == 2 * 2**30
    assert mem.memory_plan(DREAM, length=4096, cache=True).cache == 224 * 2**20


def measured_peak(model, input_ids, positions):
    """Bytes of the tensors alive at the worst moment of a forward."""
    with (
        torch.no_grad(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        model(input_ids, logit_positions=positions)
    events = profiler.profiler.kineto_results.events()
    events = [e for e in events if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [256, 768, 1352])
def test_activations_are_what_a_forward_holds(dtype, inner):
    # Two layers: the last one computes the wanted columns only. Many heads: the tables
    # of the rotary angles, head_dim wide, are not in the plan.
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_hidden_layers": 2}
    config = DLMConfig(intermediate_size=inner, **sizes)
    model = DiffusionLM(config).to(dtype).eval()
    input_ids = torch.zeros(4, 64, dtype=torch.long)
    positions = torch.zeros(4, 64, dtype=torch.bool)
    positions[:, 0] = True
    peak = measured_peak(model, input_ids, positions)
    plan = mem.memory_plan(config, 4, 64, dtype, logit_positions=4)
    assert peak == pytest.approx(plan.activations, rel=0.12)


def test_activations_do_not_grow_with_depth():
    peaks = []
    for layers in (1, 6):
        config = DLMConfig(hidden_size=256, num_hidden_layers=layers)
        model = DiffusionLM(config).eval()
        input_ids = torch.zeros(4, 64, dtype=torch.long)
        positions = torch.ones(4, 64, dtype=torch.bool)
        peaks.append(measured_peak(model, input_ids, positions))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)


def test_what_fits_keeps_headroom(monkeypatch):
    monkeypatch.setattr(mem, "host_memory", lambda: 12e9)
    plan = mem.memory_plan(LLADA, length=1024)  # 16.0 GB of weights
    assert plan.fits == {
        "CPU": False,
        "16 GB": False,
        "24 GB": True,
        "80 GB": True,
        "141 GB": True,
    }
    assert "smallest GPU that fits: 24 GB" in plan.advice
    exact = mem.memory_plan(SMALL).total
    monkeypatch.setattr(mem, "host_memory", lambda: exact)
    assert not mem.memory_plan(SMALL).fits["CPU"]
    monkeypatch.setattr(mem, "host_memory", lambda: exact / 0.89)
    assert mem.memory_plan(SMALL).fits["CPU"]


def test_advice_when_nothing_fits():
    plan = mem.memory_plan(DREAM, batch=64, length=4096)
    assert not any(plan.fits[name] for name in mem.GPU_SIZES)
    assert "largest part is logits" in plan.advice
    for change in ("batch=1: ", "logit_positions", "length=2048: ", "device_map"):
        assert change in plan.advice
    rest = plan.total - plan.weights
    assert f"batch=1: {(plan.weights + rest / 64) / 1e9:.2f} GB" in plan.advice


def test_advice_when_the_weights_are_too_much():
    huge = SimpleNamespace(**{**vars(LLADA), "num_hidden_layers": 3200})
    plan = mem.memory_plan(huge, length=128, dtype=torch.float32)
    assert "largest part is weights" in plan.advice
    rest = plan.total - plan.weights
    for bits in (8, 4):
        after = (plan.weights * bits / 32 + rest) / 1e9
        assert f"{bits}-bit weights: {after:.2f} GB" in plan.advice
    assert "batch=" not in plan.advice  # it is 1 already
    assert "length=" not in plan.advice  # it would change nothing that counts


def test_plan_reads_as_a_table():
    lines = str(mem.memory_plan(LLADA, length=1024)).splitlines()
    assert lines[0].split() == ["weights", "16.03", "GB"]
    assert [line.split()[0] for line in lines[:5]] == [
        *("weights", "activations", "logits", "cache", "total"),
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert "16 GB no · 24 GB yes" in lines[5]
    assert [mem._text(x) for x in (999, 1e3, 2.5e6)] == ["999 B", "1.00 kB", "2.50 MB"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch=0), r"batch=0: expected an integer >= 1"),
        (dict(length=1.5), r"length=1.5: expected an integer >= 1"),
        (dict(dtype=torch.int8), r"dtype=torch.int8: expected a floating-point"),
        (dict(dtype="bf16"), r"dtype='bf16': expected a floating-point"),
        (dict(length=4, logit_positions=5), r"logit_positions=5: .* from 1 to 4"),
        (dict(logit_positions=0), r"logit_positions=0: expected None or"),
    ],
)
def test_plan_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        mem.memory_plan(SMALL, **arguments)


# ---- out of memory


def cpu_out_of_memory():
    """The error that torch itself raises: more than any machine has."""
    torch.empty(2**60, dtype=torch.uint8)


def cuda_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.")


def numpy_out_of_memory():
    raise MemoryError


OUT_OF_MEMORY = [cpu_out_of_memory, cuda_out_of_memory, numpy_out_of_memory]


def limited(capacity, sizes, fail=cuda_out_of_memory):
    """A step that doubles its items and holds at most `capacity` of them."""

    def step(batch):
        sizes.append(len(batch))
        if len(batch) > capacity:
            fail()
        return [2 * item for item in batch]

    return step


@patch.object(mem, "release_memory", lambda: None)  # collecting garbage takes the time
@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 50))
def test_every_item_once_and_in_order(count, batch_size, capacity):
    done = []

    def step(batch):
        if len(batch) > capacity:
            cuda_out_of_memory()
        done.extend(batch)
        return [2 * item for item in batch]

    results = list(mem.back_off(step, range(count), batch_size))
    assert results == [2 * item for item in range(count)]
    assert done == list(range(count))


@pytest.mark.parametrize("fail", OUT_OF_MEMORY)
def test_halves_resumes_and_remembers(fail):
    sizes = []
    results = list(mem.back_off(limited(3, sizes, fail), list(range(10)), 8))
    assert results == list(range(0, 20, 2))
    assert sizes == [8, 4, 2, 2, 2, 2, 2]


def test_short_last_batch_is_halved_itself():
    sizes = []
    step = limited(1, sizes)
    assert list(mem.back_off(step, [5, 6, 7], 64)) == [10, 12, 14]
    assert sizes == [3, 1, 1, 1]


def test_resumes_where_it_was():
    calls = []

    def step(batch):
        calls.append(list(batch))
        if 6 in batch and len(batch) > 2:
            cuda_out_of_memory()
        return batch

    assert list(mem.back_off(step, list(range(10)), 4)) == list(range(10))
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5], [6, 7], [8, 9]]


def test_tensors_are_sliced_and_given_row_by_row():
    rows = torch.arange(10).view(5, 2)
    sizes = []

    def step(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            cuda_out_of_memory()
        return batch + 1

    assert torch.equal(torch.stack(list(mem.back_off(step, rows, 5))), rows + 1)
    assert sizes == [5, 2, 2, 1]


@pytest.mark.parametrize("fail", OUT_OF_MEMORY)
def test_one_item_too_much_raises_the_original_error(fail):
    sizes = []
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        list(mem.back_off(limited(0, sizes, fail), [1, 2, 3], 4))
    assert sizes == [3, 1]
    assert caught.traceback[-1].name == fail.__name__


@pytest.mark.parametrize("error", [RuntimeError("shape"), ValueError("out of memory")])
def test_other_errors_pass_at_once(error):
    sizes = []

    def fail():
        raise error

    with pytest.raises(type(error)) as caught:
        list(mem.back_off(limited(0, sizes, fail), [1, 2, 3, 4], 4))
    assert caught.value is error
    assert sizes == [4]


def test_back_off_says_so(caplog):
    list(mem.back_off(limited(2, []), [1, 2, 3, 4], 4))
    assert "going on with batches of 2" in caplog.text


def test_cached_blocks_are_released_before_the_retry(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("mps"))
    list(mem.back_off(limited(1, []), [1, 2], 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    list(mem.back_off(limited(1, []), [1, 2], 2))
    assert calls == ["cuda", "mps"]


def test_back_off_refuses():
    with pytest.raises(ValueError, match=r"batch_size=0: expected an integer >= 1"):
        list(mem.back_off(lambda batch: batch, [1], 0))
    with pytest.raises(ValueError, match=r"len\(step\(batch\)\)=1: .*each of 2 items"):
        list(mem.back_off(lambda batch: batch[:1], [1, 2], 2))


# ---- on a real GPU

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@gpu
@needs_cuda
def test_gpu_peak_is_what_the_plan_says():
    config = DLMConfig(hidden_size=1024, intermediate_size=3072, vocab_size=1000)
    model = DiffusionLM(config).to("cuda", torch.bfloat16).eval()
    input_ids = torch.zeros(4, 1024, dtype=torch.long, device="cuda")
    positions = torch.zeros(4, 1024, dtype=torch.bool, device="cuda")
    positions[:, 0] = True
    with torch.no_grad():
        model(input_ids, logit_positions=positions)  # workspaces
        gauges.reset_peak_memory("cuda")
        model(input_ids, logit_positions=positions)
    plan = mem.memory_plan(config, 4, 1024, logit_positions=4)
    assert gauges.peak_memory("cuda") == pytest.approx(plan.total, rel=0.25)


@gpu
@needs_cuda
def test_gpu_out_of_memory_is_backed_off():
    capacity = torch.cuda.get_device_properties(0).total_memory
    sizes = []

    def step(batch):
        sizes.append(len(batch))
        torch.empty(capacity // 3 * len(batch), dtype=torch.uint8, device="cuda")
        return batch

    assert list(mem.back_off(step, list(range(8)), 8)) == list(range(8))
    assert sizes[0] == 8 and sizes[-1] <= 2


# ---------------------------------------------------------------- room for the weights


def test_there_is_room_up_to_the_last_byte():
    size = mem.count_parameters(SMALL) * 2
    mem.check_room("x", SMALL, "cpu", 16, free=size)
    with pytest.raises(MemoryError, match=r"x: .* 16 bits each"):
        mem.check_room("x", SMALL, "cpu", 16, free=size - 1)


def test_a_refusal_says_what_would_fit():
    """LLaDA-8B in 9 GB: half precision does not, quantized weights do."""
    with pytest.raises(MemoryError) as caught:
        mem.check_room("LLaDA", LLADA, "cpu", 32, free=9e9)
    first, *ways = str(caught.value).splitlines()
    assert "32.06 GB" in first and "9.00 GB free on cpu" in first
    assert ["(fits)" in way for way in ways] == [False, True, True, False]
    assert [way.split(": ")[1].removesuffix(" (fits)") for way in ways[:3]] == [
        "16.03 GB",
        "8.02 GB",
        "4.01 GB",
    ]
    assert "device_map" in ways[3]


def test_room_is_asked_of_the_device(monkeypatch):
    monkeypatch.setattr(mem, "free_memory", lambda device: 1)
    with pytest.raises(MemoryError, match=r"1 B free on cpu"):
        mem.check_room("x", SMALL, "cpu", 32)
