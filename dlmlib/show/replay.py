"""A row of a trace as lines of cells: what every picture of denoising is drawn from."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from dlmlib.errors import check
from dlmlib.show.palette import END_SYMBOL, MASK_SYMBOL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dlmlib.decoding.trace import Trace


class Cell(NamedTuple):
    """One position at one step.

    `kind` is "mask", "erased" (a mask again: taken back since the line before),
    "written" (since the line before), "kept" (earlier) or "prompt" (given).
    `confidence` is the probability of the token when it was written, nan otherwise.
    """

    step: int
    position: int
    text: str
    kind: str
    confidence: float


def replay(
    trace: "Trace",
    tokenizer: "PreTrainedTokenizerBase",
    row: int = 0,
    steps: Sequence[int] | None = None,
) -> list[list[Cell]]:
    """The canvas of `row` after each of `steps`, padding left out.

    Args:
        trace: what `decode(..., trace=True)` recorded.
        tokenizer: names the token ids.
        row: which row of the batch.
        steps: increasing step numbers, 0 (the start) to S; None for all S + 1.

    Returns:
        One line of cells a step.

    Raises:
        ValueError: a row or step outside the trace, or a trace without steps.
    """
    check_row(trace, row)
    steps = range(trace.steps + 1) if steps is None else list(steps)
    check(
        len(steps) > 0
        and all(0 <= step <= trace.steps for step in steps)
        and all(a < b for a, b in pairwise(steps)),
        "steps",
        list(steps),
        f"increasing integers in 0..{trace.steps}",
    )
    name = token_names(tokenizer, trace.mask_token_id)
    wrote = _latest(trace.written[:, row])  # [S + 1, T], 0 for never
    erased = _latest(trace.erased[:, row])
    given = trace.start[row] != trace.mask_token_id
    lines = []
    for before, step in zip([steps[0] - 1, *steps], steps, strict=False):
        ids = trace.canvas(step)[row]
        line = []
        for position in trace.valid[row].nonzero()[:, 0].tolist():
            when, confidence = int(wrote[step, position]), float("nan")
            if ids[position] == trace.mask_token_id:
                kind = "erased" if erased[step, position] > max(before, 0) else "mask"
            elif when > max(before, 0):
                kind = "written"
                confidence = float(trace.logprob[when - 1, row, position].exp())
            else:
                kind = "prompt" if given[position] and when == 0 else "kept"
            text = name(int(ids[position]))
            line.append(Cell(step, position, text, kind, confidence))
        lines.append(line)
    return lines


def check_row(trace: "Trace", row: int) -> None:
    """Refuse a trace without steps and a row outside the batch."""
    rows = trace.start.shape[0]
    check(trace.steps > 0, "trace.steps", trace.steps, "at least one recorded step")
    valid = isinstance(row, int) and 0 <= row < rows
    check(valid, "row", row, f"an integer in 0..{rows - 1}")


def some_steps(trace: "Trace", row: int, lines: int) -> list[int]:
    """At most `lines` step numbers, evenly from 0 to the row's last change."""
    check_row(trace, row)
    changed = (trace.written | trace.erased)[:, row].any(-1).nonzero()
    last = int(changed[-1]) + 1 if len(changed) else trace.steps
    count = min(lines, last + 1)
    return torch.linspace(0, last, count).round().int().tolist()


def token_names(tokenizer: "PreTrainedTokenizerBase", mask_token_id: int):
    """A function from a token id to the short text that the pictures show."""
    names = {mask_token_id: MASK_SYMBOL}
    for filler in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        if filler is not None:
            names.setdefault(filler, END_SYMBOL)

    def name(token: int) -> str:
        if token not in names:
            text = tokenizer.decode([token]).replace("\n", "⏎")
            names[token] = text.strip() or "␣" * max(len(text), 1)
        return names[token]

    return name


def wrap_columns(widths: Sequence[float], available: float, gap: float):
    """Place columns from left to right, in as many lines as they need.

    Args:
        widths: of each column; one wider than the line gets a line of its own.
        available: width of a line, in the same unit.
        gap: between two columns.

    Returns:
        (line, left edge) of each column.
    """
    places, line, left = [], 0, 0.0
    for width in widths:
        if left > 0 and left + width > available:
            line, left = line + 1, 0.0
        places.append((line, left))
        left += width + gap
    return places


def _latest(events):
    """[S, T] bool to [S + 1, T]: the latest step with an event, from 1; 0 for none."""
    steps = torch.arange(1, len(events) + 1, device=events.device)
    first = torch.zeros_like(events[:1], dtype=torch.long)
    return torch.cat([first, events * steps[:, None]]).cummax(0).values
