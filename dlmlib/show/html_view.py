"""Denoising as aligned text: HTML for one strip, and a widget that replays a trace.

Every frame is text before it is colour: a mask is a symbol, a new token is bold, so the
story survives where inline styles are stripped. A frame brings its own light face, so
it also reads on a dark page.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import ipywidgets
from IPython.display import HTML
from matplotlib.colors import to_hex

from dlmlib.errors import check
from dlmlib.show.palette import (
    CONFIDENCE,
    END_SYMBOL,
    ERASED,
    FAINT,
    INK,
    MASK,
    MASK_INK,
    PAPER,
    PROMPT,
    ink_on,
)
from dlmlib.show.replay import Cell, replay, some_steps, wrap_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dlmlib.decoding.trace import Trace

WIDTH = 100  # characters a line
PANEL = (
    f"background:{PAPER};color:{INK};border:1px solid {FAINT};border-radius:6px;"
    "padding:10px 12px;margin:0;overflow-x:auto;font-family:'DejaVu Sans Mono',Menlo,"
    "Consolas,monospace;font-size:13px;line-height:1.75;white-space:pre"
)


def strip_html(
    trace: "Trace",
    tokenizer: "PreTrainedTokenizerBase",
    row: int = 0,
    steps: Sequence[int] | None = None,
) -> HTML:
    """The denoising strip as text, for the last line of a cell.

    Args:
        trace: what `decode(..., trace=True)` recorded.
        tokenizer: names the token ids.
        row: which row of the batch.
        steps: increasing step numbers in 0..S; None for about ten, evenly spread.

    Raises:
        ValueError: a row or step outside the trace, or a trace without steps.

    Introduced in notebook 00.
    """
    steps = some_steps(trace, row, 10) if steps is None else steps
    body = "\n".join(_texts(replay(trace, tokenizer, row, steps)))
    return HTML(f'<pre class="dlm-strip" style="{PANEL}">{body}</pre>')


def scrubber(
    trace: "Trace", tokenizer: "PreTrainedTokenizerBase", row: int = 0
) -> "Scrubber":
    """Replay a trace step by step: play, drag, or use the arrow keys on the slider.

    Args:
        trace: what `decode(..., trace=True)` recorded.
        tokenizer: names the token ids.
        row: which row of the batch.

    Returns:
        A widget that shows step 0 first. The notebook puts a static `strip` above it.

    Raises:
        ValueError: a row outside the trace, or a trace without steps.

    Introduced in notebook 03.
    """
    texts = _texts(replay(trace, tokenizer, row))
    return Scrubber([f'<pre style="{PANEL}">{text}</pre>' for text in texts])


class Scrubber(ipywidgets.VBox):
    """Play button and slider over frames of HTML that are all made beforehand.

    Moving the slider only swaps a string, so that it follows within a frame or two.

    Args:
        frames: HTML of each value of the slider, from 0.
        name: what the slider counts.
    """

    def __init__(self, frames: Sequence[str], name: str = "step") -> None:
        check(len(frames) > 0, "frames", list(frames), "at least one HTML string")
        self.frames = tuple(frames)
        last = len(frames) - 1
        self.play = ipywidgets.Play(max=last, interval=400)
        self.slider = ipywidgets.IntSlider(
            max=last, description=name, layout=ipywidgets.Layout(width="60%")
        )
        self.view = ipywidgets.HTML(value=self.frames[0])
        ipywidgets.jslink((self.play, "value"), (self.slider, "value"))
        self.slider.observe(self._show, names="value")
        super().__init__([ipywidgets.HBox([self.play, self.slider]), self.view])
        self.add_class("dlm-scrubber")

    def _show(self, change) -> None:
        self.view.value = self.frames[change["new"]]

    def __repr__(self) -> str:
        return f"Scrubber of {len(self.frames)} frames: run the notebook to move it"


def _texts(lines: list[list[Cell]]) -> list[str]:
    """One aligned block of text a step, as HTML spans."""
    columns = zip(*lines, strict=True)
    widths = [max(len(cell.text) for cell in column) for column in columns]
    places = wrap_columns(widths, WIDTH, 1)
    return [_text(line, widths, places) for line in lines]


def _text(line: list[Cell], widths: list[int], places) -> str:
    """The cells of one step, behind its number; long canvases wrap under it."""
    step = line[0].step
    spoken = " ".join(cell.text for cell in line)
    html, wrapped = f'<span style="color:{PROMPT}">{step:>4}</span>  ', 0
    for cell, width, (below, _) in zip(line, widths, places, strict=True):
        if below > wrapped:
            html, wrapped = html + "\n      ", below
        html += _span(cell, width) + " "
    return (
        f'<span class="dlm-step" data-step="{step}" role="img" '
        f'aria-label="step {step}: {escape(spoken)}">{html}</span>'
    )


def _span(cell: Cell, width: int) -> str:
    """One cell, padded to its column."""
    text = escape(cell.text) + " " * (width - len(cell.text))
    if cell.kind == "mask":
        return _styled(text, "mask", f"background:{MASK};color:{MASK_INK}")
    if cell.kind == "erased":
        style = f"background:{MASK};color:{ERASED};outline:1px solid {ERASED}"
        return f"<s>{_styled(text, 'erased', style)}</s>"
    if cell.kind == "written":
        sure = cell.confidence == cell.confidence  # nan when the run kept none
        face = to_hex(CONFIDENCE(cell.confidence)) if sure else PAPER
        style = f"background:{face};color:{ink_on(face)}"
        return f"<b>{_styled(text, 'written', style)}</b>"
    color = PROMPT if cell.kind == "prompt" else INK
    return _styled(
        text, cell.kind, f"color:{FAINT if cell.text == END_SYMBOL else color}"
    )


def _styled(text: str, kind: str, style: str) -> str:
    return f'<span class="dlm-{kind}" style="{style};border-radius:3px">{text}</span>'
