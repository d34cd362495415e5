"""A cached block step against its lower bound: reading every weight once.

With few positions at a time a forward is bound by memory, not by arithmetic: it cannot
be faster than its weights come in. `python -m dlmlib.bench --step` says how near it is.
"""

from collections.abc import Callable
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor

from dlmlib.gauges import Timer, graphed
from dlmlib.model import DiffusionLM, KVCache


def weight_bytes(model: DiffusionLM) -> int:
    """Bytes of the weights that a forward reads in full: all but the embedding table.

    Of the table a forward reads the rows of its tokens; tied, it is the output layer.

    Introduced in notebook 08.
    """
    table = model.get_input_embeddings().weight
    skipped = None if model.config.tie_word_embeddings else table
    return sum(p.nbytes for p in model.parameters() if p is not skipped)


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `run`, after one run that is not counted."""
    times = []
    for _ in range(1 + repeats):
        with Timer(device) as timer:
            run()
        times.append(timer.seconds)
    return median(times[1:])


def copy_bandwidth(device: torch.device, size: int = 2**30, repeats: int = 10) -> float:
    """Bytes a second that the device moves in a copy, counted as read and written.

    Args:
        device: where.
        size: bytes copied at a time; far more than the caches hold.
        repeats: copies timed.

    Introduced in notebook 08.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, repeats)


def block_step(
    model: DiffusionLM, ids: Int[Tensor, "B T"], start: int, stop: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A step of dual-cache decoding, with shapes that never change.

    Returns:
        A function that computes the columns [start, stop) of `ids` over the keys and
        values of the others, and returns their best tokens and log-probabilities [N].

    Introduced in notebook 08.
    """
    cache, block = KVCache(ids.shape[1]), ids[:, start:stop]
    everywhere = torch.arange(block.numel(), device=ids.device)
    model(ids, cache=cache, states_only=True)

    def step() -> tuple[Tensor, Tensor]:
        options = {"cache": cache, "start": start, "logit_positions": everywhere}
        logits = model(block, **options).logits.float()
        best, token = logits.max(-1)
        return token, best - logits.logsumexp(-1)

    return step


@torch.no_grad()
def measure_step(model: DiffusionLM, ids, start: int, stop: int, repeats: int) -> dict:
    """How long a block step takes, in multiples of reading the weights once.

    Returns:
        bytes: of the weights. bandwidth: bytes/s of a copy. read_seconds: the first
        over the second. eager_seconds, graph_seconds: of a step as it is, and replayed
        as one graph where the device has graphs. ratio: the faster over read_seconds.

    Introduced in notebook 08.
    """
    device, step = model.device, block_step(model, ids, start, stop)
    size, bandwidth = weight_bytes(model), copy_bandwidth(device)
    eager = seconds(step, device, repeats)
    graph = seconds(graphed(step, device), device, repeats)
    return {
        "bytes": size,
        "bandwidth": bandwidth,
        "read_seconds": size / bandwidth,
        "eager_seconds": eager,
        "graph_seconds": graph,
        "ratio": min(eager, graph) * bandwidth / size,
    }
