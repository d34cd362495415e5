"""AdamW, what it decays, and its learning rate over a run."""

import math
from collections.abc import Iterable

import torch
from torch import nn

FINAL_LR = 0.01  # share of the peak that the cosine ends on


def learning_rate(step: int, steps: int, lr: float, warmup: int) -> float:
    """Rate of update `step` in 1 … steps: linear up to `lr`, then half a cosine down.

    The last step has FINAL_LR times the peak.

    Args:
        step: from 1.
        steps: length of the run.
        lr: the peak.
        warmup: steps of the linear part.

    Introduced in notebook 02.
    """
    if step <= warmup:
        return lr * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return lr * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * done)) / 2)


def adamw(
    parameters: Iterable[nn.Parameter], weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW that decays matrices only, not norms and biases.

    Args:
        parameters: those to train.
        weight_decay: pull of a matrix towards zero, per step and unit of learning rate.
        betas: decay of the two moments.

    Source: AdamW (arXiv 1711.05101). Introduced in notebook 02.
    """
    decayed, free = [], []
    for parameter in parameters:
        (decayed if parameter.dim() >= 2 else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=betas, fused=True)
