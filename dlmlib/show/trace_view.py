"""Steps against positions: the order of commitment and the confidence behind it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from dlmlib.errors import check
from dlmlib.show.palette import (
    AMOUNT,
    CONFIDENCE,
    ERASED,
    EXACT,
    INK,
    MASK,
    PAPER,
    PROMPT,
    ink_on,
)
from dlmlib.show.replay import check_row, token_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dlmlib.decoding.trace import Trace


def order(
    trace: "Trace",
    tokenizer: "PreTrainedTokenizerBase",
    row: int | Sequence[int] = 0,
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """When each position was committed: positions across, steps downwards.

    One row: masked cells in the mask colour, each commit in its confidence, tokens
    taken back crossed out. Several rows: the share of rows that write a position's
    final token at a step, and the mean step as a dashed line.

    Args:
        trace: what `decode(..., trace=True)` recorded.
        tokenizer: names the token ids.
        row: a row of the batch, or several of equal layout.
        title: the finding.
        ax: where to draw; None for a new figure.

    Raises:
        ValueError: a row outside the trace, or a trace without steps.

    Introduced in notebook 03.
    """
    if not isinstance(row, int):
        return _order_of_many(trace, list(row), title, ax)
    check_row(trace, row)
    ax = _stage(trace, title, ax)
    valid = trace.valid[row].cpu()
    image = _masked_image(trace, row)
    written = trace.written[:, row].cpu().numpy()
    confidence = trace.logprob[:, row].exp().cpu().numpy()
    image[written] = CONFIDENCE(confidence[written])[:, :3]
    _image(ax, image[:, valid])
    steps, positions = np.nonzero(trace.erased[:, row, valid].cpu().numpy())
    ax.plot(positions, steps + 1, "x", color=ERASED, markeredgewidth=1.4)
    _token_axis(ax, trace, tokenizer, row)
    _confidence_bar(ax, "confidence when committed")
    return ax


def confidence_strip(
    trace: "Trace",
    tokenizer: "PreTrainedTokenizerBase",
    row: int = 0,
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """How sure the model was of its proposal at every open position, step by step.

    Positions still masked but not open yet keep the mask colour; a dot marks the
    proposals that were committed.

    Args:
        trace: what `decode(..., trace=True)` recorded.
        tokenizer: names the token ids.
        row: which row of the batch.
        title: the finding.
        ax: where to draw; None for a new figure.

    Raises:
        ValueError: a row outside the trace, or a trace without steps.

    Introduced in notebook 03.
    """
    check_row(trace, row)
    ax = _stage(trace, title, ax)
    valid = trace.valid[row].cpu()
    image = _masked_image(trace, row)
    confidence = trace.logprob[:, row].exp().cpu().numpy()
    known = ~np.isnan(confidence)
    image[known] = CONFIDENCE(confidence[known])[:, :3]
    _image(ax, image[:, valid])
    for step, position in trace.written[:, row, valid].nonzero().tolist():
        color = ink_on(image[:, valid][step, position])
        ax.plot(position, step + 1, ".", color=color, markersize=4)
    _token_axis(ax, trace, tokenizer, row)
    _confidence_bar(ax, "confidence of the proposal")
    return ax


def _order_of_many(trace, rows, title, ax):
    check(len(rows) > 0, "row", rows, "a row or a list of rows")
    for row in rows:
        check_row(trace, row)
    ax = _stage(trace, title, ax)
    steps, length = trace.written.shape[0], trace.written.shape[2]
    commit = trace.commit_step[rows].cpu()  # [N, T], -1 for never
    share = torch.zeros(steps, length)
    for step in range(steps):
        share[step] = (commit == step).float().mean(0)
    seen = share.masked_fill(share == 0, torch.nan).numpy()
    image = _image(ax, seen, cmap=AMOUNT, vmin=0)
    ever = (commit >= 0).sum(0)
    mean = (commit + 1).clamp(min=0).sum(0) / ever.where(ever > 0, torch.nan)
    ax.plot(mean.numpy(), "--", color=EXACT, linewidth=1.2)
    last = int(ever.nonzero()[-1]) if ever.any() else 0
    ax.annotate(
        "mean", (last, float(mean[last])), (5, 0), textcoords="offset points",
        va="center", size=8,
    )  # fmt: skip
    ax.set_xlabel("position")
    ax.figure.colorbar(image, ax=ax, label=f"share of {len(rows)} rows", pad=0.02)
    return ax


def _stage(trace, title: str, ax: Axes | None) -> Axes:
    """Axes with the steps downwards, one unit a step."""
    if ax is None:
        steps = trace.written.shape[0]
        _, ax = plt.subplots(figsize=(7, min(max(1.6 + 0.16 * steps, 2.4), 5)))
    ax.set_title(title)
    ax.set_ylabel("step")
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def _masked_image(trace, row: int) -> np.ndarray:
    """[S, T, 3]: the mask colour where a position is masked after the step."""
    canvases = torch.stack([trace.canvas(s + 1)[row] for s in range(trace.steps)])
    masked = (canvases == trace.mask_token_id).cpu().numpy()
    return np.where(masked[..., None], to_rgb(MASK), to_rgb(PAPER))


def _image(ax: Axes, values: np.ndarray, **options):
    """Values [S, T] or colours [S, T, 3] as cells, step 1 on top."""
    steps, length = values.shape[:2]
    extent = (-0.5, length - 0.5, steps + 0.5, 0.5)
    image = ax.imshow(values, extent=extent, **options)
    if max(steps, length) <= 64:  # white lines between the cells
        ax.set_xticks(np.arange(length + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(steps + 1) + 0.5, minor=True)
        ax.grid(True, which="minor", color=PAPER, linewidth=1)
        ax.tick_params(which="minor", length=0)
    return image


def _token_axis(ax: Axes, trace, tokenizer, row: int) -> None:
    """Name the positions by their final tokens, given ones in grey."""
    name = token_names(tokenizer, trace.mask_token_id)
    valid = trace.valid[row]
    ids = trace.canvas(trace.steps)[row, valid].tolist()
    if len(ids) > 64:
        ax.set_xlabel("position")
        return
    ax.set_xticks(range(len(ids)), [name(i) for i in ids], rotation=60, ha="right")
    ax.tick_params(axis="x", length=0)
    for label in ax.get_xticklabels():
        label.set(rotation_mode="anchor", size=8)
    given = (trace.start[row, valid] != trace.mask_token_id).tolist()
    for label, grey in zip(ax.get_xticklabels(), given, strict=True):
        label.set_color(PROMPT if grey else INK)


def _confidence_bar(ax: Axes, label: str) -> None:
    ax.figure.colorbar(
        ScalarMappable(cmap=CONFIDENCE), ax=ax, label=label, pad=0.02, ticks=[0, 0.5, 1]
    )
