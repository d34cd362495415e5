"""Where work runs: device, dtype and why, seeds, scale.

Beside `gauges` no other file of the library asks what hardware there is.
"""

import os
import platform
import random
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlmlib.errors import check

Value = TypeVar("Value")

SCALES = ("ci", "laptop", "full")


# ---- device and dtype


@dataclass(frozen=True)
class Choice:
    """A device, the dtype to compute in, and why these two."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def _available() -> list[str]:
    """The kinds of device on this machine, the preferred one first."""
    kinds = ["cuda"] * torch.cuda.is_available()
    return kinds + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


def _parse(name: str, value: str | torch.device) -> torch.device:
    """Read a device's name and refuse one that is not on this machine."""
    kinds = _available()
    expected = f"one of {kinds} on this machine"
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    check(device is not None and device.type in kinds, name, str(value), expected)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        within = (device.index or 0) < count
        check(within, name, str(value), f"a CUDA index from 0 to {count - 1}")
    return device


def _dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """bfloat16 where the GPU computes in it natively, float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32, f"float32 on {device.type}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU computes in bfloat16"
    return torch.float32, "the GPU has no bfloat16"


def pick_device(device: str | torch.device | None = None) -> Choice:
    """Choose the device and dtype, and say why.

    The argument wins over the environment variable DLM_DEVICE, which wins over
    the best device here: cuda, then mps, then cpu.

    Args:
        device: "cuda", "cuda:1", "mps" or "cpu"; None to choose.

    Returns:
        Choice(device, dtype, reason).

    Raises:
        ValueError: the device is unknown or not on this machine.

    Introduced in notebook 00.
    """
    override = os.environ.get("DLM_DEVICE")
    if device is not None:
        chosen, reason = _parse("device", device), "asked for by the caller"
    elif override:
        chosen, reason = _parse("DLM_DEVICE", override), "asked for by DLM_DEVICE"
    else:
        chosen = torch.device(_available()[0])
        reason = {
            "cuda": "a CUDA GPU is here",
            "mps": "no CUDA GPU, but Apple's MPS is here",
            "cpu": "no CUDA GPU and no MPS here",
        }[chosen.type]
    dtype, why = _dtype(chosen)
    return Choice(chosen, dtype, f"{reason}; {why}")


# ---- seeds and scale


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A seeded source of random numbers on `device`.

    Args:
        seed: an integer from 0 to 2^32 - 1.
        device: where the draws are made.

    Raises:
        ValueError: the seed is not such an integer.

    Introduced in notebook 00.
    """
    _check_seed(seed)
    return torch.Generator(device=device).manual_seed(seed)


def uniform(
    shape, generator: torch.Generator | None, device, dtype=torch.float32
) -> torch.Tensor:
    """Uniform [0, 1) draws made on the generator's own device, then moved.

    One seed therefore gives one stream, whatever device the model runs on.
    """
    source = generator.device if generator is not None else device
    drawn = torch.rand(shape, generator=generator, device=source, dtype=dtype)
    return drawn.to(device)


def _check_seed(seed: int) -> None:
    expected = "an integer from 0 to 2**32 - 1"  # what numpy accepts
    check(isinstance(seed, int) and 0 <= seed < 2**32, "seed", seed, expected)


def current_scale() -> str:
    """The scale of the run: DLM_SCALE, or "laptop" when it is not set.

    Returns:
        "ci" (seconds a cell, for tests), "laptop" or "full" (published sizes).

    Raises:
        ValueError: DLM_SCALE is none of the three.

    Introduced in notebook 00.
    """
    name = os.environ.get("DLM_SCALE") or "laptop"
    check(name in SCALES, "DLM_SCALE", name, f"one of {list(SCALES)}")
    return name


def scale(*, ci: Value, laptop: Value, full: Value) -> Value:
    """The one of three values that belongs to the current scale.

    Args:
        ci, laptop, full: the value at each scale.

    Raises:
        ValueError: DLM_SCALE is none of the three.

    Introduced in notebook 00.
    """
    return {"ci": ci, "laptop": laptop, "full": full}[current_scale()]


def setup(seed: int = 0, device: str | torch.device | None = None) -> torch.device:
    """Seed everything and print, in four lines, what the run depends on.

    Python's, numpy's and torch's global generators are seeded for code outside the
    library; the library itself draws from the generators it is given.

    Args:
        seed: an integer from 0 to 2^32 - 1.
        device: as in `pick_device`.

    Returns:
        The device to put models and tensors on.

    Raises:
        ValueError: a seed, device or DLM_SCALE that is not accepted.

    Introduced in notebook 00.
    """
    _check_seed(seed)
    choice, scale_name = pick_device(device), current_scale()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    packages = [f"{name} {version(name)}" for name in ("transformers", "dlmlib")]
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    dtype = str(choice.dtype).removeprefix("torch.")
    print(*versions, *packages, sep=" · ")
    print(f"device {choice.device}: {choice.reason}")
    print(f"dtype {dtype} · {torch.get_num_threads()} threads")
    print(f"seed {seed} · scale {scale_name}")
    return choice.device


# ---- the output layer


def output_layer(head: nn.Module, x: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
    """head(x), on a CPU in the form that is fastest for few rows.

    With few rows and a large vocabulary the product is bound by reading the weights,
    and torch's x W^T reads them badly: as W x^T, eight rows at a time, it takes 40 to
    60 % less time up to 16 rows (two cores, width 512, vocabulary 126464).

    Args:
        head: the output layer; anything but a large plain matrix on a CPU is called.
        x: final states.
    Introduced in notebook 08.
    """
    plain = (
        type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
    )
    few = x.dim() == 2 and 1 < len(x) <= 24 and not torch.is_grad_enabled()
    if not (plain and few and head.weight.device.type == "cpu"):
        return head(x)
    if head.weight.numel() < 2**22:
        return head(x)
    logits = x.new_empty(len(x), len(head.weight))
    for start in range(0, len(x), 8):
        rows = slice(start, start + 8)
        logits[rows] = (head.weight @ x[rows].T).T
    return logits
