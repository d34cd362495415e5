"""What a call costs: seconds, replay without Python, memory in use and memory free."""

import gc
import os
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch.autograd.profiler import profile

Value = TypeVar("Value")


# ---- time


def synchronize(device: str | torch.device) -> None:
    """Wait until `device` has finished what it was given. Introduced in notebook 00."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


class Timer:
    """Measure the seconds of a block, waiting for the device before and after.

    >>> with Timer(device) as timer: model(input_ids)
    >>> timer.seconds

    Introduced in notebook 00.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = device
        self.seconds = float("nan")

    def __enter__(self) -> "Timer":
        synchronize(self.device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self._start


def graphed(run: Callable[[], Value], device: str | torch.device) -> Callable:
    """`run` recorded once and replayed as a whole, without Python, on CUDA.

    Its shapes and tensors must stay the same; what it returns is overwritten by every
    replay. On other devices, which have no such graphs, it is `run` itself.

    Introduced in notebook 08.
    """
    if torch.device(device).type != "cuda":
        return run
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # warm up apart from the stream that is recorded
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

    def replay():
        graph.replay()
        return result

    return replay


# ---- memory in use

_rss_at_reset = 0  # the CPU keeps no allocator statistics, so we remember this


def _resident(field: str) -> int:
    """Bytes of this process in RAM: now ("VmRSS") or at the peak ("VmHWM")."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))
    except (OSError, StopIteration):  # not Linux: the peak only, never reset
        import resource  # does not exist on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: str | torch.device) -> None:
    """Start a new measurement of `peak_memory`. Introduced in notebook 00."""
    global _rss_at_reset
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif kind == "cpu":
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # peak := now
            _rss_at_reset = _resident("VmRSS")
        except OSError:  # not Linux, or not allowed: the old peak stays
            _rss_at_reset = _resident("VmHWM")


def peak_memory(device: str | torch.device) -> int:
    """The most memory held since `reset_peak_memory(device)`, in bytes.

    The devices do not measure the same thing, so compare only like with like:

    - CUDA: the most bytes in live tensors, weights included (torch's allocator).
    - CPU: how far the process's resident memory rose above where it stood at the
      reset. Weights loaded before do not count. Memory that was freed earlier but
      kept by the process is used again unseen, and where the system cannot reset
      the peak only growth above the old peak is seen: read it as a lower bound.
    - MPS: the bytes in live tensors now, since MPS keeps no peak.

    Introduced in notebook 00.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if kind == "mps":
        return torch.mps.current_allocated_memory()
    return max(0, _resident("VmHWM") - _rss_at_reset)


def extra_memory(run: Callable[[], object], device: str | torch.device) -> int:
    """The most bytes that `run()` holds in tensors beyond those held before it.

    On the CPU, whose resident memory says little about reused memory, torch's own
    record of allocations is added up; on CUDA the allocator keeps the peak. MPS keeps
    none, so there it is what the run leaves behind.

    Introduced in notebook 08.
    """
    if torch.device(device).type != "cpu":
        reset_peak_memory(device)
        before = peak_memory(device)
        run()
        return peak_memory(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks otherwise
    with profile(profile_memory=True) as record:
        run()
    events = (e for e in record.kineto_results.events() if e.name() == "[memory]")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    return max(accumulate((change for _, change in changes), initial=0))


def host_memory() -> int:
    """Bytes of main memory that are free to use now."""
    return psutil.virtual_memory().available


def free_memory(device: str | torch.device) -> int:
    """Bytes that are free now where tensors on `device` live."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory()


def release_memory() -> None:
    """Give cached blocks back, so that a smaller batch finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
