"""The training loop: one function for a notebook's minute and for several processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlmlib.device import pick_device
from dlmlib.errors import check
from dlmlib.training.progress import progress_bar
from dlmlib.training.run import Batch, FitResult, Run

STATE = "training.safetensors"
PRECISIONS = ("no", "bf16")  # accelerate's names


def fit(
    model: nn.Module,
    batches: Callable[[torch.Generator], Batch],
    objective: Any,
    *,
    steps: int,
    lr: float = 2e-3,
    warmup: int | None = None,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    clip: float = 1.0,
    ema: float | None = None,
    seed: int = 0,
    precision: str | None = None,
    checkpoint: str | Path | None = None,
    save_every: int = 500,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    progress: bool = True,
) -> FitResult:
    """Train `model` in place with AdamW, linear warm-up and a cosine.

    Each step minimises sum(nats) / sum(tokens) over one global batch. Batch and noise
    come from one CPU generator, so a seed means the same on every device. Under
    `accelerate launch` or torchrun every process draws the same global batch and noise,
    takes every n-th row, and the gradients are summed: n processes do what one does.
    One process trains on the device the model is on.

    Args:
        batches: draws a global batch: input_ids [B, T] and what the objective reads.
        objective: `corrupt(batch, generator)` -> dict with tokens [B], and
            `objective(model, noised)` -> nats [B]; for example `NELBO`.
        steps: number of updates.
        lr: peak learning rate, reached after `warmup` steps (default: 5 % of `steps`).
        weight_decay: of matrices; norms and biases have none.
        clip: largest norm of the gradient; math.inf for no limit.
        ema: decay of a moving average of the weights, smaller in the first steps. The
            model is left holding the average, `result.raw_state` the last weights;
            `evaluate` sees the average.
        seed: of the generator that batches and noise are drawn from.
        precision: "bf16" for autocast or "no"; default by device (see `pick_device`).
        checkpoint: folder of the training state, written every `save_every` steps. The
            same call continues from it, with the numbers it would have had.
        evaluate: called without gradients every `evaluate_every` steps and at the end.
        progress: show a bar with loss, tokens per second and time left.
    Returns:
        FitResult.
    Raises:
        ValueError: an argument out of range, or a checkpoint of another run.
        FloatingPointError: loss or gradient is not finite; the checkpoint is kept.

    Source: AdamW (arXiv 1711.05101). Introduced in notebook 02.
    """
    check(isinstance(steps, int) and steps >= 1, "steps", steps, "an integer >= 1")
    dtype = pick_device(next(model.parameters()).device).dtype
    settings = {
        "steps": steps,
        "lr": lr,
        "warmup": steps // 20 if warmup is None else warmup,
        "weight_decay": weight_decay,
        "betas": list(betas),
        "clip": clip,
        "ema": ema,
        "seed": seed,
        "precision": precision or ("bf16" if dtype == torch.bfloat16 else "no"),
    }
    _check_settings(settings, save_every, evaluate_every)
    run = Run(model, batches, objective, settings)
    if checkpoint is not None:
        run.resume(Path(checkpoint) / STATE)
    show = progress and run.state.is_main_process
    with progress_bar(steps, run.result.steps, show) as bar:
        for step in range(run.result.steps + 1, steps + 1):
            entry = run.step(step)
            if evaluate and (step == steps or step % (evaluate_every or steps) == 0):
                entry |= run.evaluate(evaluate)
            if checkpoint is not None and (step == steps or step % save_every == 0):
                run.save(Path(checkpoint) / STATE)
            bar.set_postfix_str(run.summary(), refresh=False)
            bar.update()
    return run.finish()


def _check_settings(settings, save_every, evaluate_every) -> None:
    """Refuse values outside their range, each by name."""
    whole, every = "an integer >= 1", evaluate_every
    check(save_every >= 1, "save_every", save_every, whole)
    check(every is None or every >= 1, "evaluate_every", every, f"{whole}, or None")
    steps, warmup, ema = settings["steps"], settings["warmup"], settings["ema"]
    check(0 <= warmup <= steps, "warmup", warmup, f"within [0, steps] = [0, {steps}]")
    for name in ("lr", "clip"):
        check(settings[name] > 0, name, settings[name], "a number > 0")
    decay, betas = settings["weight_decay"], settings["betas"]
    check(decay >= 0, "weight_decay", decay, "a number >= 0")
    inside = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    check(inside, "betas", betas, "two numbers within [0, 1)")
    check(ema is None or 0 < ema < 1, "ema", ema, "within (0, 1), or None")
    precision = settings["precision"]
    check(precision in PRECISIONS, "precision", precision, f"one of {PRECISIONS}")
