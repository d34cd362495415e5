"""The denoising strip: a run as lines of words, one line a step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import TextPath

from dlmlib.show.palette import (
    CONFIDENCE,
    END_SYMBOL,
    ERASED,
    FAINT,
    INK,
    MASK,
    MASK_INK,
    MASK_SYMBOL,
    PAPER,
    PROMPT,
    ink_on,
)
from dlmlib.show.replay import Cell, replay, some_steps, wrap_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dlmlib.decoding.trace import Trace

LARGEST, SMALLEST = 9.5, 6.5  # size of a token in points; below that, lines wrap
MARGIN = 36.0  # points left of the tokens, for the step numbers


def strip(
    trace: "Trace",
    tokenizer: "PreTrainedTokenizerBase",
    row: int = 0,
    steps: Sequence[int] | None = None,
    *,
    title: str = "",
) -> Axes:
    """The canvas step by step: masks, what each step wrote and how sure it was.

    Args:
        trace: what `decode(..., trace=True)` recorded.
        tokenizer: names the token ids.
        row: which row of the batch.
        steps: increasing step numbers in 0..S; None for about ten, evenly spread.
            A token counts as new when it was written since the line above.
        title: the finding.

    Returns:
        The axes of a new figure as wide as the style says. A cell's text carries the
        gid "step-position".

    Raises:
        ValueError: a row or step outside the trace, or a trace without steps.

    Introduced in notebook 00.
    """
    steps = some_steps(trace, row, 10) if steps is None else steps
    lines = replay(trace, tokenizer, row, steps)
    width = plt.rcParams["figure.figsize"][0] * 72
    size, columns, places = _columns(lines, width - MARGIN)
    leading = 1.75 * size
    tall = (places[-1][0] + 1) * leading + (0.5 * leading if places[-1][0] else 0.0)
    height = len(lines) * tall + 2 * leading
    _, ax = plt.subplots(figsize=(width / 72, (height + 26 * bool(title)) / 72))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    ax.set_title(title)
    for index, line in enumerate(lines):
        top = index * tall
        label = f"step {line[0].step}" if index == 0 else str(line[0].step)
        ax.text(
            MARGIN - 8, top + 0.68 * leading, label, ha="right", color=PROMPT, size=7
        )
        for cell, column, (wrapped, left) in zip(line, columns, places, strict=True):
            box = (MARGIN + left, top + wrapped * leading, column, 0.9 * leading)
            _draw(ax, cell, box, size)
    _legend(ax, lines, (len(lines) * tall + 0.8 * leading, leading))
    return ax


def _columns(lines: list[list[Cell]], available: float):
    """Token size, column widths and (line, left) places, all in points."""
    texts = [{cell.text for cell in column} for column in zip(*lines, strict=True)]
    ems = [max(_em(text) for text in column) + 0.8 for column in texts]
    gap = 0.25
    fitting = (available - 2) / (sum(ems) + gap * (len(ems) - 1))
    size = min(max(fitting, SMALLEST), LARGEST)
    widths = [em * size for em in ems]
    return size, widths, wrap_columns(widths, available, gap * size)


def _em(text: str) -> float:
    """Width of `text` in units of its size."""
    return float(TextPath((0, 0), text, size=100).get_extents().x1) / 100


def _draw(ax: Axes, cell: Cell, box: tuple[float, ...], size: float) -> None:
    """One rounded cell; `box` is left, top, width, height in points."""
    left, top, width, height = box
    face, ink, edge = _colors(cell)
    if face:
        ax.add_patch(
            FancyBboxPatch(
                (left, top), width, height, facecolor=face, edgecolor=edge or face,
                boxstyle=f"round,pad=0,rounding_size={0.3 * size}",
                linewidth=1.1 if edge else 0, gid=f"{cell.step}-{cell.position}",
            )
        )  # fmt: skip
    ax.text(
        left + width / 2, top + height / 2 + 0.36 * size, cell.text, size=size,
        color=ink, ha="center", gid=f"{cell.step}-{cell.position}",
    )  # fmt: skip


def _colors(cell: Cell):
    """Face, text and edge colour of a cell; None where nothing is drawn."""
    if cell.kind in ("mask", "erased"):
        return MASK, MASK_INK, ERASED if cell.kind == "erased" else None
    if cell.kind == "written":
        face = PAPER if np.isnan(cell.confidence) else CONFIDENCE(cell.confidence)
        return face, ink_on(face), None
    if cell.text == END_SYMBOL:
        return None, FAINT, None
    return None, PROMPT if cell.kind == "prompt" else INK, None


def _legend(ax: Axes, lines: list[list[Cell]], place: tuple[float, float]) -> None:
    """One line under the strip that names what occurs in it."""
    top, leading = place
    kinds = {cell.kind for line in lines for cell in line}
    entries = [([Cell(-1, 0, MASK_SYMBOL, "mask", np.nan)], "masked")]
    chips = [
        Cell(-1, i, f"{p:.0%}", "written", p) for i, p in enumerate((0.25, 0.5, 1.0))
    ]
    entries.append((chips, "just written, with this confidence"))
    if "erased" in kinds:
        entries.append(([Cell(-1, 0, MASK_SYMBOL, "erased", np.nan)], "taken back"))
    if "prompt" in kinds:
        entries.append(([Cell(-1, 0, "word", "prompt", np.nan)], "given"))
    left, size = MARGIN, 7.0
    for cells, words in entries:
        for cell in cells:
            width = (_em(cell.text) + 0.8) * size
            _draw(ax, cell, (left, top, width, 0.75 * leading), size)
            left += width + 2
        ax.text(
            left + 3,
            top + 0.375 * leading + 0.36 * size,
            words,
            size=size,
            color=PROMPT,
        )
        left += _em(words) * size + 18
