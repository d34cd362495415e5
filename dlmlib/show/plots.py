"""Plain plots with the course's habits: the title is the finding, axes carry units."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap

from dlmlib.errors import check
from dlmlib.show.palette import AMOUNT, DIFFUSION, EXACT, ink_on

History = Mapping[str, Sequence[float]]


def learning_curve(
    histories: History | Sequence[History],
    *,
    title: str,
    ylabel: str = "loss [nats per token]",
    y: str = "loss",
    x: str = "step",
    entropy: float | None = None,
    label: str = "",
    color: str = DIFFUSION,
    ax: Axes | None = None,
) -> Axes:
    """Loss against steps or seconds, over the line that no model can cross.

    Args:
        histories: columns of numbers by name, one mapping a seed.
        title: the finding.
        ylabel: the quantity and its unit.
        y: the column to draw.
        x: "step" or "seconds" (the mean over the seeds).
        entropy: the data's exact entropy, in the unit of `y`.
        label: name of the curve, written at its end.
        color: `show.DIFFUSION` or `show.AUTOREGRESSIVE`.
        ax: where to draw; None for a new figure.

    Raises:
        ValueError: no history, a column missing, or seeds recorded at different steps.

    Introduced in notebook 02.
    """
    histories = [histories] if isinstance(histories, Mapping) else list(histories)
    check(len(histories) > 0, "histories", histories, "at least one history")
    check(x in ("step", "seconds"), "x", x, "'step' or 'seconds'")
    for history in histories:
        check({"step", x, y} <= set(history), "histories", [*history], f"{x} and {y}")
        same = np.array_equal(history["step"], histories[0]["step"])
        check(same, "histories", history["step"], "the same steps for every seed")
    along = np.mean([_array(history[x]) for history in histories], axis=0)
    values = np.stack([_array(history[y]) for history in histories])
    xlabel = {"step": "training step", "seconds": "training time [s]"}[x]
    ax = curve(
        along, values, title=title, xlabel=xlabel, ylabel=ylabel, label=label,
        color=color, marker="", ax=ax,
    )  # fmt: skip
    if entropy is not None:
        reference(ax, entropy, f"exact entropy {entropy:.3f}")
    return ax


def curve(
    x: Sequence[float],
    ys: Any,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    label: str = "",
    color: str = DIFFUSION,
    marker: str = "o",
    ax: Axes | None = None,
) -> Axes:
    """A line through the mean of several runs, in a band of one standard deviation.

    Args:
        x: increasing values.
        ys: [len(x)], or [seeds, len(x)].
        title: the finding.
        xlabel, ylabel: the quantities and their units.
        label: name of the line, written at its end instead of in a legend.
        color: of line, band and label.
        marker: at the points that were measured; "" for none.
        ax: where to draw, over what is there; None for a new figure.

    Raises:
        ValueError: x does not increase, or ys does not match it.

    Introduced in notebook 01.
    """
    x, ys = _array(x), np.atleast_2d(_array(ys))
    rising = x.ndim == 1 and len(x) > 0 and bool((np.diff(x) > 0).all())
    check(rising, "x", x.tolist(), "increasing numbers")
    expected = f"[{len(x)}] or [seeds, {len(x)}]"
    check(ys.ndim == 2 and ys.shape[1] == len(x), "ys.shape", ys.shape, expected)
    ax = _stage(ax, title, xlabel, ylabel)
    mean = ys.mean(0)
    ax.plot(x, mean, color=color, marker=marker)
    if len(ys) > 1:
        spread = ys.std(0, ddof=1)
        ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
    if label:
        _name_at_end(ax, x[-1], mean[-1], label, color)
    return ax


def reference(ax: Axes, y: float, label: str) -> None:
    """A dashed line at the exact value, named on the line.

    Introduced in notebook 02.
    """
    ax.axhline(y, color=EXACT, linestyle="--", linewidth=1.1)
    ax.annotate(
        label, (0.01, y), (0, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", color=EXACT, size=8,
    )  # fmt: skip


def heat(
    values: Any,
    rows: Sequence[object],
    columns: Sequence[object],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    unit: str,
    number: str = ".2f",
    cmap: Colormap = AMOUNT,
    limits: tuple[float | None, float | None] = (None, None),
    ax: Axes | None = None,
) -> Axes:
    """A table of numbers as colours, with the numbers in it.

    Args:
        values: [rows, columns]; nan for what was not measured.
        rows, columns: their labels.
        title: the finding.
        xlabel, ylabel: what columns and rows stand for, with units.
        unit: the quantity and its unit, beside the colour bar.
        number: format of a cell.
        cmap: `show.AMOUNT`, or `show.CONFIDENCE` for confidences.
        limits: values of the lightest and the darkest colour; None for the data's.
        ax: where to draw; None for a new figure.

    Raises:
        ValueError: values do not match rows and columns.

    Introduced in notebook 03.
    """
    values, shape = _array(values), (len(rows), len(columns))
    check(values.shape == shape, "values.shape", values.shape, f"{shape}")
    ax = _stage(ax, title, xlabel, ylabel, height=1.3 + 0.36 * len(rows))
    ax.grid(False)
    image = ax.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1])
    ax.set_xticks(range(len(columns)), [str(c) for c in columns])
    ax.set_yticks(range(len(rows)), [str(r) for r in rows])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        measured = not np.isnan(value)
        ax.text(
            column, row, format(value, number) if measured else "–", size=8.5,
            ha="center", va="center",
            color=ink_on(image.cmap(image.norm(value))) if measured else EXACT,
        )  # fmt: skip
    ax.figure.colorbar(image, ax=ax, label=unit, pad=0.02).outline.set_visible(False)
    return ax


def bars(
    labels: Sequence[str],
    values: Any,
    *,
    title: str,
    ylabel: str,
    colors: str | Sequence[str] = DIFFUSION,
    number: str = ".2f",
    ax: Axes | None = None,
) -> Axes:
    """Means over seeds as bars, with one standard deviation and the number on top.

    Args:
        labels: name of each bar.
        values: [len(labels)], or [seeds, len(labels)].
        title: the finding.
        ylabel: the quantity and its unit.
        colors: one, or one a bar.
        number: format of the mean.
        ax: where to draw; None for a new figure.

    Raises:
        ValueError: values do not match labels.

    Introduced in notebook 02.
    """
    values = np.atleast_2d(_array(values))
    fits = values.ndim == 2 and values.shape[1] == len(labels) > 0
    expected = f"[{len(labels)}] or [seeds, {len(labels)}], at least one bar"
    check(fits, "values.shape", values.shape, expected)
    ax = _stage(ax, title, "", ylabel)
    ax.grid(False, axis="x")
    spread = values.std(0, ddof=1) if len(values) > 1 else None
    drawn = ax.bar(
        range(len(labels)), values.mean(0), yerr=spread, width=0.62, color=colors,
        error_kw={"ecolor": EXACT, "elinewidth": 1.2, "capsize": 3},
    )  # fmt: skip
    ax.bar_label(drawn, fmt=f"{{:{number}}}", padding=3, size=8.5)
    ax.set_xticks(range(len(labels)), labels)
    ax.margins(y=0.15)
    return ax


def _stage(ax, title: str, xlabel: str, ylabel: str, height: float = 3.4) -> Axes:
    """New axes unless given some, with their title and labels."""
    if ax is None:
        _, ax = plt.subplots(figsize=(plt.rcParams["figure.figsize"][0], height))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title)
    return ax


def _name_at_end(ax: Axes, x: float, y: float, label: str, color: str) -> None:
    """Write a line's name beside its last point, clear of the names already there."""
    ax.annotate(
        label, (x, y), (6, 0), textcoords="offset points", color=color, va="center",
        size=8.5, weight="bold", gid="line-name",
    )  # fmt: skip
    names = [text for text in ax.texts if text.get_gid() == "line-name"]
    names.sort(key=lambda text: text.xy[1])
    points = 72 / ax.figure.dpi
    free = -np.inf  # lowest height in points that is not taken yet
    for text in names:
        own = ax.transData.transform(text.xy)[1] * points
        place = max(own, free)
        text.xyann = (6, place - own)
        free = place + 11


def _array(values: Any) -> np.ndarray:
    """Numbers from lists, arrays and tensors on any device."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=float)
