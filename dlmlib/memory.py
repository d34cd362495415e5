"""What fits in memory: a plan before a model is loaded, a retreat when it was wrong."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dlmlib.errors import check
from dlmlib.gauges import free_memory, host_memory, release_memory

logger = logging.getLogger(__name__)
Item, Value = TypeVar("Item"), TypeVar("Value")

GPU_SIZES = {"16 GB": 16e9, "24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}
HEADROOM = 0.10  # kept free for the driver's context, workspaces, fragmentation


def count_parameters(config: Any) -> int:
    """The number of parameters of `DiffusionLM(config)`, without building it.

    With K = D · kv heads / heads the width of the keys and I that of the MLP,

        N = (2 - tied) V D + L [2 D² + 2 D K + bias (D + 2 K) + 3 D I + 2 D] + D.

    Args:
        config: a DLMConfig, or anything with its fields.

    Introduced in notebook 00.
    """
    width, inner = config.hidden_size, config.intermediate_size
    keys = width // config.num_attention_heads * config.num_key_value_heads
    attention = 2 * width**2 + 2 * width * keys
    bias = (width + 2 * keys) if config.qkv_bias else 0
    layer = attention + bias + 3 * width * inner + 2 * width
    tables = 1 if config.tie_word_embeddings else 2
    table = config.vocab_size * width
    return tables * table + config.num_hidden_layers * layer + width


def _text(size: float) -> str:
    """1234567 -> "1.23 MB"; 1 GB is 10^9 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


@dataclass(frozen=True)
class MemoryPlan:
    """What a forward pass needs, in bytes, and where it fits; see `memory_plan`."""

    weights: int
    activations: int
    logits: int
    cache: int
    fits: dict[str, bool]
    advice: str

    @property
    def total(self) -> int:
        """All four parts together [bytes]."""
        return self.weights + self.activations + self.logits + self.cache

    def __str__(self) -> str:
        parts = ("weights", "activations", "logits", "cache", "total")
        rows = [f"{part:<12}{_text(getattr(self, part)):>10}" for part in parts]
        verdict = [f"{name} {'yes' if ok else 'no'}" for name, ok in self.fits.items()]
        return "\n".join([*rows, "fits: " + " · ".join(verdict), self.advice])


def _parts(
    config: Any, batch: int, length: int, dtype: torch.dtype, cache: bool, logits: int
) -> dict[str, int]:
    """The parts of `memory_plan` in bytes; `logits` is how many positions get them."""
    width, keys = config.hidden_size, config.num_key_value_heads
    keys *= width // config.num_attention_heads
    tokens, layers, size = batch * length, config.num_hidden_layers, dtype.itemsize
    # The two moments at which a layer holds most. Three of width D are the residual
    # before and after attention and its normed copy (or, in attention, the queries).
    mlp = (3 * width + 3 * config.intermediate_size) * size
    rotary = (3 * width + keys) * size + 5 * 4 * width
    return {
        "weights": count_parameters(config) * size,
        "activations": tokens * max(mlp, rotary),
        "logits": logits * config.vocab_size * 4,
        "cache": 2 * layers * keys * tokens * size if cache else 0,
    }


def _fits(total: float, size: float) -> bool:
    return total <= size * (1 - HEADROOM)


def _advice(parts: dict[str, int], batch: int, length: int, itemsize: int) -> str:
    """The smallest GPU that fits, or what each change would bring it down to."""
    total, weights = sum(parts.values()), parts["weights"]
    for name, size in GPU_SIZES.items():
        if _fits(total, size):
            return f"The smallest GPU that fits: {name} ({HEADROOM:.0%} kept free)."
    largest, rest = max(parts, key=parts.get), total - weights
    changes = {
        "batch=1": weights + rest / batch,
        "logits at a few positions only (logit_positions)": total - parts["logits"],
        f"length={max(1, length // 2)}": weights + rest / 2,
        "8-bit weights": rest + weights / itemsize,
        "4-bit weights": rest + weights / itemsize / 2,
    }
    useful = [f"{c}: {_text(x)}" for c, x in changes.items() if x < 0.9 * total]
    return (
        f"No GPU listed fits; the largest part is {largest}. Try "
        + "; ".join([*useful, 'or keep layers on the CPU (device_map="auto")'])
        + "."
    )


def memory_plan(
    config: Any,
    batch: int = 1,
    length: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    cache: bool = False,
    logit_positions: int | None = None,
) -> MemoryPlan:
    """Say before loading a model what a forward pass needs and where it fits.

        weights      N · bytes                   N from `count_parameters`
        activations  B · T · max((3 D + 3 I) · bytes, (3 D + K) · bytes + 20 D)
        logits       positions · V · 4           float32
        cache        2 · L · K · B · T · bytes   keys and values; K, I as there

    Weights, logits and cache are exact. Activations are an estimate: without
    gradients only one layer's are alive, most of them in the MLP or where rotary
    positions make five float32 copies; fused attention keeps no T x T scores.
    The total adds all four although activations and logits hardly overlap.

    Args:
        config: a DLMConfig, or anything with its fields.
        batch: B, rows.
        length: T, positions a row, prompt included.
        dtype: of weights, activations and cache.
        cache: whether keys and values of all positions are kept.
        logit_positions: how many positions of the batch get logits, 1 to B·T;
            None for all.

    Returns:
        A MemoryPlan: bytes of each part, `fits` for the free memory of this
        machine's CPU and for four sizes of GPU (1 GB = 10^9 bytes), and `advice`.
        Printing it gives a small table.

    Raises:
        ValueError: an argument is outside its range.

    Introduced in notebook 00.
    """
    for name, value in (("batch", batch), ("length", length)):
        check(isinstance(value, int) and value >= 1, name, value, "an integer >= 1")
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    check(floating, "dtype", dtype, "a floating-point torch.dtype")
    tokens = batch * length
    positions = tokens if logit_positions is None else logit_positions
    within = isinstance(positions, int) and 1 <= positions <= tokens
    expected = f"None or an integer from 1 to {tokens}"
    check(within, "logit_positions", positions, expected)
    parts = _parts(config, batch, length, dtype, cache, positions)
    sizes = {"CPU": host_memory(), **GPU_SIZES}
    fits = {name: _fits(sum(parts.values()), size) for name, size in sizes.items()}
    advice = _advice(parts, batch, length, dtype.itemsize)
    return MemoryPlan(**parts, fits=fits, advice=advice)


def check_room(
    name: str,
    config: Any,
    device: str | torch.device,
    bits: int,
    free: int | None = None,
) -> None:
    """Refuse to load weights that are larger than what is free, and say what would do.

    Args:
        name: what is to be loaded, for the message.
        config: its config; N from `count_parameters`.
        device: where it is to be.
        bits: of a weight: 32, 16, 8 or 4.
        free: bytes there; None to ask the device.
    Raises:
        MemoryError: N · bits / 8 is more than that.

    Introduced in notebook 06.
    """
    count = count_parameters(config)
    free = free_memory(device) if free is None else free
    if count * bits / 8 <= free:
        return
    ways = {
        16: "dtype=torch.bfloat16",
        8: "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
        4: "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
    }
    lines = [
        f"  {way}: {_text(count * b / 8)}" + " (fits)" * (count * b / 8 <= free)
        for b, way in ways.items()
        if b < bits
    ]
    raise MemoryError(
        f"{name}: {_text(count * bits / 8)} of weights, {bits} bits each, do not fit "
        f"in the {_text(free)} free on {device}. What would do:\n"
        + "\n".join(lines)
        + '\n  device_map="auto": spread over the GPUs, main memory and, with '
        "offload_folder=…, the disk"
    )


def _out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def back_off(
    step: Callable[[Sequence[Item]], Sequence[Value]],
    items: Sequence[Item],
    batch_size: int,
) -> Iterator[Value]:
    """Run `step` over batches of items; halve the batch when memory runs out.

    The batch that failed is tried again at half its size, and the run goes on from
    there with that size. What was finished stays finished: results come one an item,
    each exactly once and in order, whatever sizes were needed.

    Args:
        step: takes a slice of `items`, returns one result an item. It may be
            called again with a part of a batch on which it ran out of memory.
        items: a list, a tensor, or anything with a length and slices.
        batch_size: the size to start with.

    Yields:
        The results, in the order of the items.

    Raises:
        ValueError: batch_size below 1, or a step that returns another number of
            results than it got items.
        The step's own error, when it is not about memory or one item is too much.

    Introduced in notebook 06.
    """
    whole = isinstance(batch_size, int) and batch_size >= 1
    check(whole, "batch_size", batch_size, "an integer >= 1")
    done = 0
    while done < len(items):
        batch = items[done : done + batch_size]
        try:
            results = step(batch)
        except Exception as error:
            if len(batch) == 1 or not _out_of_memory(error):
                raise
            results = None  # retry outside, where the failed frames are let go
        if results is None:
            batch_size = len(batch) // 2
            logger.warning("out of memory: going on with batches of %d", batch_size)
            release_memory()
            continue
        expected = f"one result for each of {len(batch)} items"
        check(len(results) == len(batch), "len(step(batch))", len(results), expected)
        yield from results
        done += len(batch)
