"""device.py: choices and their reasons, seeds, scale, time, memory in use."""

import random
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlmlib import device as dev
from dlmlib import gauges


@pytest.fixture
def hardware(monkeypatch):
    """Pretend that this machine has the named devices."""
    monkeypatch.delenv("DLM_DEVICE", raising=False)

    def pretend(cuda=0, mps=False, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        # torch counts emulated, slow bfloat16 as supported unless told not to
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: bf16 or including_emulation,
        )
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


# ---- device and dtype


@pytest.mark.parametrize(
    ("here", "device", "dtype", "reason"),
    [
        (dict(), "cpu", torch.float32, "no CUDA GPU and no MPS here; float32 on cpu"),
        (dict(mps=True), "mps", torch.float32, "but Apple's MPS is here; float32"),
        (dict(cuda=1), "cuda", torch.bfloat16, "a CUDA GPU is here; the GPU computes"),
        (dict(cuda=1, mps=True), "cuda", torch.bfloat16, "a CUDA GPU is here"),
        (dict(cuda=1, bf16=False), "cuda", torch.float32, "the GPU has no bfloat16"),
    ],
)
def test_best_device_and_its_reason(hardware, here, device, dtype, reason):
    hardware(**here)
    choice = dev.pick_device()
    assert (choice.device, choice.dtype) == (torch.device(device), dtype)
    assert reason in choice.reason


def test_argument_beats_environment_beats_best(hardware, monkeypatch):
    hardware(cuda=2, mps=True)
    monkeypatch.setenv("DLM_DEVICE", "mps")
    assert dev.pick_device().device.type == "mps"
    assert "DLM_DEVICE" in dev.pick_device().reason
    assert dev.pick_device("cuda:1").device == torch.device("cuda:1")
    assert "caller" in dev.pick_device(torch.device("cpu")).reason
    monkeypatch.setenv("DLM_DEVICE", "")
    assert dev.pick_device().device.type == "cuda"


@pytest.mark.parametrize("name", ["abacus", "cuda", "mps", "cuda:x", "meta"])
def test_unknown_or_absent_device_is_named(hardware, monkeypatch, name):
    hardware()
    with pytest.raises(ValueError, match=rf"device='{name}': .*\['cpu'\]"):
        dev.pick_device(name)
    monkeypatch.setenv("DLM_DEVICE", name)
    with pytest.raises(ValueError, match=rf"DLM_DEVICE='{name}': expected one of"):
        dev.pick_device()


def test_cuda_index_must_exist(hardware):
    hardware(cuda=2)
    with pytest.raises(ValueError, match=r"device='cuda:2': .* from 0 to 1"):
        dev.pick_device("cuda:2")


# ---- seeds, scale, setup


def test_generator_repeats_itself():
    first, second = dev.generator(7), dev.generator(7)
    assert torch.equal(torch.rand(5, generator=first), torch.rand(5, generator=second))
    other = torch.rand(5, generator=dev.generator(8))
    assert not torch.equal(torch.rand(5, generator=dev.generator(7)), other)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, None])
def test_bad_seed(seed):
    for make in (dev.generator, dev.setup):
        with pytest.raises(ValueError, match=f"seed={seed!r}: expected an integer"):
            make(seed)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ci", 1), ("laptop", 2), ("full", 3), ("", 2), (None, 2)],
)
def test_scale_chooses(monkeypatch, name, expected):
    monkeypatch.delenv("DLM_SCALE", raising=False)
    if name is not None:
        monkeypatch.setenv("DLM_SCALE", name)
    assert dev.scale(ci=1, laptop=2, full=3) == expected
    assert dev.current_scale() == (name or "laptop")


def test_bad_scale(monkeypatch):
    monkeypatch.setenv("DLM_SCALE", "huge")
    expected = r"DLM_SCALE='huge': expected one of \['ci', 'laptop', 'full'\]"
    for call in (dev.current_scale, lambda: dev.scale(ci=1, laptop=2, full=3)):
        with pytest.raises(ValueError, match=expected):
            call()


def test_setup_prints_at_most_four_lines(capsys, hardware, monkeypatch):
    hardware()
    monkeypatch.setenv("DLM_SCALE", "ci")
    assert dev.setup(seed=5) == torch.device("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 4
    text = "\n".join(lines)
    for word in ("python 3.", "torch 2.", "transformers ", "dlmlib ", "float32"):
        assert word in text
    for word in ("device cpu: no CUDA", "threads", "seed 5", "scale ci"):
        assert word in text


def test_setup_seeds_all_three_generators(capsys):
    def draw():
        dev.setup(seed=11, device="cpu")
        return random.random(), np.random.rand(), torch.rand(()).item()

    first = draw()
    assert draw() == first
    dev.setup(seed=12, device="cpu")
    assert random.random() != first[0]


# ---- time


def test_timer_waits_for_its_device_before_and_after(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda d: events.append(str(d)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: events.append("mps"))
    with gauges.Timer("cuda:1"):
        events.append("work")
    with gauges.Timer(torch.device("mps")):
        events.append("work")
    with gauges.Timer():
        events.append("work")
    assert events == ["cuda:1", "work", "cuda:1", "mps", "work", "mps", "work"]


def test_timer_measures_between_the_two_waits(monkeypatch):
    clock = iter([100.0, 102.5])
    monkeypatch.setattr(gauges.time, "perf_counter", lambda: next(clock))
    with gauges.Timer() as timer:
        assert np.isnan(timer.seconds)
    assert timer.seconds == 2.5


# ---- memory in use


def test_cpu_peak_is_the_rise_since_the_reset():
    size = 64 * 2**20
    gauges.reset_peak_memory("cpu")
    torch.ones(size, dtype=torch.uint8)  # freed at once: a peak, not a level
    assert 0.9 * size < gauges.peak_memory("cpu") < 1.5 * size
    gauges.reset_peak_memory("cpu")
    assert gauges.peak_memory("cpu") < size / 4


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
def test_cpu_peak_without_proc(monkeypatch, platform, unit):
    def absent(*_):
        raise FileNotFoundError

    peaks = iter([1000, 1500])
    usage = lambda _: SimpleNamespace(ru_maxrss=next(peaks))  # noqa: E731
    monkeypatch.setattr(gauges.Path, "read_text", absent)
    monkeypatch.setattr(gauges.Path, "write_text", absent)
    monkeypatch.setattr(resource, "getrusage", usage)
    monkeypatch.setattr(gauges.sys, "platform", platform)
    gauges.reset_peak_memory("cpu")
    assert gauges.peak_memory("cpu") == 500 * unit


def test_gpu_peaks_come_from_the_allocator(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 1234)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 99)
    gauges.reset_peak_memory("cuda:1")
    assert calls == ["cuda:1"]
    assert gauges.peak_memory("cuda:1") == 1234
    assert gauges.peak_memory("mps") == 99


def test_extra_memory_counts_tensors():
    """Two of three tensors of 4 MB live at once; what lived before does not count."""
    before = torch.ones(1_000_000)

    def run():
        one = before + 1
        two = one + 1
        del one
        return two + 1

    assert 8_000_000 <= gauges.extra_memory(run, "cpu") < 8_100_000
    assert gauges.extra_memory(lambda: None, "cpu") == 0


def test_extra_memory_of_a_gpu_is_above_what_was_held(monkeypatch):
    calls, held = [], iter([1000, 1500])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: next(held))
    extra = gauges.extra_memory(lambda: calls.append("run"), "cuda:1")
    assert (extra, calls) == (500, ["cuda:1", "run"])


# ---- on a real GPU

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@gpu
@needs_cuda
def test_gpu_is_picked_and_used(monkeypatch, capsys):
    monkeypatch.delenv("DLM_DEVICE", raising=False)
    assert dev.setup().type == "cuda"
    draws = torch.rand(3, device="cuda", generator=dev.generator(1, "cuda"))
    again = torch.rand(3, device="cuda", generator=dev.generator(1, "cuda"))
    assert torch.equal(draws, again)


@gpu
@needs_cuda
def test_gpu_timer_waits_for_the_kernels():
    wide = torch.randn(8192, 8192, device="cuda")
    _ = wide @ wide
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with gauges.Timer("cuda") as timer:
        start.record()
        for _ in range(10):
            _ = wide @ wide
        stop.record()
    assert timer.seconds >= 0.95 * start.elapsed_time(stop) / 1000


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 24, 25])
@pytest.mark.parametrize("width", [4, 512])
def test_output_layer_is_the_layer(rows, width):
    """Small layers are called as they are, a large one row group by row group."""
    head = torch.nn.Linear(width, 2**14, bias=False)
    x = torch.randn(rows, width, generator=dev.generator(0))
    with torch.no_grad():
        found = dev.output_layer(head, x)
        torch.testing.assert_close(found, head(x), rtol=1e-5, atol=1e-5)
        both = dev.output_layer(head, x[:, None].expand(-1, 2, -1))
    assert both.shape == (rows, 2, 2**14)
    assert found.is_contiguous()


def test_output_layer_calls_what_is_not_a_plain_matrix():
    calls = []

    class Counted(torch.nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    with torch.no_grad():
        dev.output_layer(Counted(512, 2**14, bias=False), torch.ones(4, 512))
    assert calls == [4]
    head, x = torch.nn.Linear(512, 2**14, bias=False), torch.ones(4, 512)
    dev.output_layer(head, x).sum().backward()
    assert head.weight.grad is not None
