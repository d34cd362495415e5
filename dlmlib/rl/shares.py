"""Rollouts over several processes: each decodes its share, all end with the whole."""

import torch
import torch.distributed as dist
from accelerate.utils import gather, pad_across_processes
from torch import Tensor

from dlmlib.device import generator as seeded
from dlmlib.errors import check


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that `fit` trains with; (0, 1) if alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_share(
    prompts: dict[str, Tensor], generator: torch.Generator
) -> tuple[dict[str, Tensor], torch.Generator]:
    """Every n-th prompt, and a generator of this process's own.

    The shared generator moves on alike in every process, so that the next prompts are
    the same everywhere.

    Raises:
        ValueError: for prompts that cannot be split evenly.
    """
    rank, world = processes()
    if world == 1:
        return prompts, generator
    count = len(prompts["input_ids"])
    check(count % world == 0, "prompts of a rollout", count, f"a multiple of {world}")
    seed = int(torch.randint(2**31, (), generator=generator)) + rank
    own = {name: tensor[rank::world] for name, tensor in prompts.items()}
    return own, seeded(seed)


def of_all(tensor: Tensor) -> Tensor:
    """The rows of every process, one process after the other.

    Copies [B, K, T] may differ in K: missing ones are filled up with zeros, which as a
    weight means that nothing is read from them.
    """
    if processes()[1] == 1:
        return tensor
    if tensor.dim() == 3:
        tensor = pad_across_processes(tensor, dim=1)
    return gather(tensor.contiguous())


def mine(rows: Tensor) -> Tensor:
    """This process's part of what `of_all` put together."""
    rank, world = processes()
    return rows.tensor_split(world)[rank]
