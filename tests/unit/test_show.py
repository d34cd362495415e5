"""The pictures show what the trace says: texts, colours, steps and numbers."""

import re
import subprocess
import sys
from html import unescape

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

import dlmlib as dlm
from dlmlib import show
from dlmlib.show.replay import replay, some_steps, wrap_columns
from dlmlib.tasks.toy import Joint
from dlmlib.text import word_tokenizer

NAMES, LETTERS = Joint.of_words({"LLADA": 0.40, "CLAUD": 0.35, "CLARA": 0.25})
GIVEN = LETTERS.encode("[MASK]L[MASK][MASK][MASK]")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def trace():
    """Two letters known or written at a time, the L given."""
    return dlm.decode(NAMES.denoiser(), [GIVEN, GIVEN], steps=4, trace=True).trace


@pytest.fixture
def revised():
    """A run in which tokens are taken back."""
    out = dlm.decode(
        NAMES.denoiser(),
        torch.full((4, 5), NAMES.mask_token_id),
        steps=4,
        revise=dlm.Remask("cap", eta=1.0),
        temperature=1.0,
        propose="random",
        generator=dlm.generator(0),
        trace=True,
    )
    assert out.trace.erased[:, 0].any()
    return out.trace


def letters(ids) -> list[str]:
    """The canvas as the pictures write it."""
    tokens = LETTERS.convert_ids_to_tokens(ids.tolist())
    return [show.MASK_SYMBOL if t == "[MASK]" else t for t in tokens]


def cells(ax) -> dict:
    """(step, position) -> text artist of a strip; the legend has step -1."""
    found = {}
    for text in ax.texts:
        place = re.fullmatch(r"(\d+)-(\d+)", text.get_gid() or "")
        if place:
            found[int(place[1]), int(place[2])] = text
    return found


def faces(ax) -> dict:
    """(step, position) -> face colour of a strip's cells that have one."""
    return {patch.get_gid(): patch.get_facecolor() for patch in ax.patches}


# ---- replay


def test_replay_names_what_happened_to_each_cell(trace):
    lines = replay(trace, LETTERS)
    assert [line[0].step for line in lines] == list(range(trace.steps + 1))
    for step, line in enumerate(lines):
        assert [cell.text for cell in line] == letters(trace.canvas(step)[0])
        for cell in line:
            now = step > 0 and bool(trace.written[step - 1, 0, cell.position])
            assert (cell.kind == "written") == now
            if now:
                p = trace.logprob[step - 1, 0, cell.position].exp()
                assert cell.confidence == pytest.approx(p.item())
            else:
                assert np.isnan(cell.confidence)
    assert lines[-1][1].kind == "prompt"


def test_steps_left_out_are_summed_up(trace):
    first, last = replay(trace, LETTERS, steps=[0, trace.steps])
    assert [cell.kind for cell in first] == ["mask", "prompt", "mask", "mask", "mask"]
    assert [cell.kind for cell in last].count("written") == 4


def test_taken_back_cells_are_named(revised):
    for step, line in enumerate(replay(revised, LETTERS)):
        erased = {cell.position for cell in line if cell.kind == "erased"}
        expected = revised.erased[step - 1, 0].nonzero()[:, 0] if step else []
        assert erased == set(map(int, expected))


def test_padding_is_left_out():
    prompts = [LETTERS.encode("[MASK]LADA"), LETTERS.encode("[MASK]LADA")]
    trace = dlm.decode(NAMES.denoiser(), prompts, trace=True).trace
    trace.valid = trace.valid.clone()
    trace.valid[1, :2] = False
    assert [cell.position for cell in replay(trace, LETTERS, row=1)[0]] == [2, 3, 4]


def test_some_steps_end_with_the_last_change(trace):
    assert some_steps(trace, 0, 10) == [0, 1, 2, 3, 4]
    assert some_steps(trace, 0, 3) == [0, 2, 4]


def test_columns_wrap_when_a_line_is_full():
    assert wrap_columns([4, 4, 4], 9, 1) == [(0, 0.0), (0, 5), (1, 0.0)]


# ---- strips


def test_strip_shows_every_canvas_in_its_colours(trace):
    ax = show.strip(trace, LETTERS, title="found")
    texts, face = cells(ax), faces(ax)
    for step in range(trace.steps + 1):
        row = letters(trace.canvas(step)[0])
        assert [texts[step, i].get_text() for i in range(5)] == row
        for i, text in enumerate(row):
            if text == show.MASK_SYMBOL:
                assert face[f"{step}-{i}"] == to_rgba(show.MASK)
    for step, i in trace.written[:, 0].nonzero().tolist():
        p = trace.logprob[step, 0, i].exp().item()
        assert face[f"{step + 1}-{i}"] == pytest.approx(show.CONFIDENCE(p))
    assert texts[0, 1].get_color() == show.PROMPT
    assert ax.get_title(loc="left") == "found"
    chips = [patch for patch in ax.patches if patch.get_gid() == "-1-2"]
    assert chips[0].get_facecolor() == show.CONFIDENCE(1.0)


def test_strip_marks_what_was_taken_back(revised):
    ax = show.strip(revised, LETTERS)
    edges = {patch.get_gid(): patch.get_edgecolor() for patch in ax.patches}
    step, position = revised.erased[:, 0].nonzero()[0].tolist()
    assert edges[f"{step + 1}-{position}"] == to_rgba(show.ERASED)


def test_long_lines_wrap():
    words = [f"word{i:03d}" for i in range(60)]
    tokenizer = word_tokenizer(words)
    ids = torch.tensor([tokenizer.encode(" ".join(words))])
    joint = Joint(ids, torch.ones(1), len(tokenizer), tokenizer.mask_token_id)
    blank = torch.full_like(ids, tokenizer.mask_token_id)
    trace = dlm.decode(joint.denoiser(), blank, steps=2, trace=True).trace
    ax = show.strip(trace, tokenizer)
    right = max(patch.get_x() + patch.get_width() for patch in ax.patches)
    assert right <= ax.get_xlim()[1] + 1
    assert len({round(patch.get_y()) for patch in ax.patches}) > 3


def test_strip_html_is_text_before_it_is_colour(trace):
    html = show.strip_html(trace, LETTERS).data
    lines = re.findall(r'data-step="(\d+)".*?aria-label="([^"]*)">(.*)</span>', html)
    assert [int(step) for step, _, _ in lines] == list(range(trace.steps + 1))
    for step, spoken, shown in lines:
        row = letters(trace.canvas(int(step))[0])
        assert spoken == f"step {step}: {' '.join(row)}"
        plain = unescape(re.sub(r"<[^>]+>", "", shown)).split()
        assert plain == [step, *row]
        written = int(trace.written[int(step) - 1, 0].sum()) if int(step) else 0
        assert shown.count("<b>") == written


def test_html_characters_are_escaped():
    tokenizer = word_tokenizer(["<b>", '"&"'])
    ids = torch.tensor([[4, 5]])
    joint = Joint(ids, torch.ones(1), len(tokenizer), tokenizer.mask_token_id)
    trace = dlm.decode(joint.denoiser(), torch.full((1, 2), 1), trace=True).trace
    html = show.strip_html(trace, tokenizer).data
    assert "&lt;b&gt;" in html and "&quot;&amp;&quot;" in html
    assert "<b><b>" not in html


# ---- scrubber


def test_scrubber_replays_frames_made_beforehand(trace, monkeypatch):
    widget = show.scrubber(trace, LETTERS)
    monkeypatch.setattr(type(trace), "canvas", None)  # replaying needs no trace
    assert "dlm-scrubber" in widget._dom_classes
    assert len(widget.frames) == trace.steps + 1
    assert widget.slider.max == widget.play.max == trace.steps
    for step in (0, 3, 1, trace.steps):
        widget.slider.value = step
        shown = re.search(r'class="dlm-step" data-step="(\d+)"', widget.view.value)
        assert int(shown[1]) == step
        masks = len(re.findall('class="dlm-mask"', widget.view.value))
        assert masks == 4 - step
    assert f"{trace.steps + 1} frames" in repr(widget)


# ---- steps against positions


def pixels(ax):
    """The drawn cells: [S, T, 3] colours or [S, T] values."""
    return np.asarray(ax.images[0].get_array())


def test_order_colours_commits_and_masks(trace):
    image = pixels(show.order(trace, LETTERS))
    for step in range(trace.steps):
        after = trace.canvas(step + 1)[0]
        for i in range(5):
            if trace.written[step, 0, i]:
                p = trace.logprob[step, 0, i].exp().item()
                expected = show.CONFIDENCE(p)[:3]
            elif after[i] == trace.mask_token_id:
                expected = to_rgba(show.MASK)[:3]
            else:
                expected = (1, 1, 1)
            assert image[step, i] == pytest.approx(expected, abs=1e-6)


def test_order_crosses_out_what_was_taken_back(revised):
    ax = show.order(revised, LETTERS)
    crosses = next(line for line in ax.lines if line.get_marker() == "x")
    expected = {(i, s + 1) for s, i in revised.erased[:, 0].nonzero().tolist()}
    assert set(map(tuple, crosses.get_xydata().astype(int).tolist())) == expected


def test_order_of_many_rows_is_a_share(revised):
    ax = show.order(revised, LETTERS, row=range(4))
    shares = pixels(ax)
    commit = revised.commit_step
    for step in range(revised.steps):
        share = (commit == step).float().mean(0).numpy()
        assert np.nan_to_num(shares[step]) == pytest.approx(share)
    assert ax.lines[0].get_ydata() == pytest.approx((commit + 1.0).mean(0).numpy())


def test_confidence_strip_shows_open_positions(trace):
    ax = show.confidence_strip(trace, LETTERS)
    image, confidence = pixels(ax), trace.confidence[:, 0]
    for step, i in (~confidence.isnan()).nonzero().tolist():
        expected = show.CONFIDENCE(confidence[step, i].item())[:3]
        assert image[step, i] == pytest.approx(expected, abs=1e-6)
    dots = {tuple(line.get_xydata()[0].astype(int).tolist()) for line in ax.lines}
    written = trace.written[:, 0].nonzero().tolist()
    assert dots == {(i, step + 1) for step, i in written}


# ---- plots


def test_curve_is_the_mean_in_a_band_of_one_deviation():
    ys = np.array([[1.0, 2.0, 4.0], [3.0, 2.0, 8.0]])
    ax = show.curve([1, 2, 4], ys, title="t", xlabel="x", ylabel="y", label="line")
    assert ax.lines[0].get_ydata() == pytest.approx(ys.mean(0))
    edge = ax.collections[0].get_paths()[0].vertices
    at_four = sorted(edge[edge[:, 0] == 4][:, 1])
    assert at_four[0] == pytest.approx(6 - ys.std(0, ddof=1)[2])
    assert at_four[-1] == pytest.approx(6 + ys.std(0, ddof=1)[2])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")


def test_names_of_close_lines_do_not_overlap():
    ax = None
    for k in range(3):
        ax = show.curve(
            [0, 1],
            [0, 1 + k / 1000],
            title="t",
            xlabel="x",
            ylabel="y",
            label=f"line {k}",
            ax=ax,
        )
    points = 72 / ax.figure.dpi
    heights = sorted(
        ax.transData.transform(text.xy)[1] * points + text.xyann[1] for text in ax.texts
    )
    assert np.diff(heights).min() >= 10.9


def test_learning_curve_meets_the_entropy():
    seeds = [{"step": [1, 2], "loss": [3.0, 2.0]}, {"step": [1, 2], "loss": [5.0, 2.0]}]
    ax = show.learning_curve(seeds, title="t", entropy=1.5)
    assert ax.lines[0].get_ydata() == pytest.approx([4.0, 2.0])
    assert list(ax.lines[1].get_ydata()) == [1.5, 1.5]
    assert "1.500" in ax.texts[0].get_text()


def test_heat_writes_its_numbers():
    values = [[0.25, float("nan")], [1.0, 0.5]]
    ax = show.heat(
        values, "ab", [1, 2], title="t", xlabel="x", ylabel="y", unit="share [%]"
    )
    assert [text.get_text() for text in ax.texts] == ["0.25", "–", "1.00", "0.50"]
    assert ax.figure.axes[1].get_ylabel() == "share [%]"


def test_bars_carry_their_mean_and_spread():
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    ax = show.bars(["a", "b"], values, title="t", ylabel="y")
    assert [patch.get_height() for patch in ax.patches] == [2.0, 2.0]
    assert "2.00" in [text.get_text() for text in ax.texts]
    low, high = ax.collections[0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(2**0.5)


def test_display_stores_alternative_text(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "IPython.display.display", lambda figure, metadata: seen.append(metadata)
    )
    ax = show.curve([1], [1], title="found", xlabel="x", ylabel="y")
    show.display(ax)
    show.display(ax, "a dot")
    assert [data["image/png"]["alt"] for data in seen] == ["found; x; y", "a dot"]


# ---- wrong input, and who imports whom


LABELS = dict(title="t", xlabel="x", ylabel="y")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: show.strip(t, LETTERS, row=2), r"row=2: expected .*0\.\.1"),
        (lambda t: show.order(t, LETTERS, row=-1), "row=-1"),
        (lambda t: show.order(t, LETTERS, row=[]), r"row=\[\]"),
        (lambda t: show.strip(t, LETTERS, steps=[0, 9]), r"steps=\[0, 9\].*0\.\.4"),
        (lambda t: show.strip(t, LETTERS, steps=[2, 1]), "steps=.*increasing"),
        (lambda t: show.Scrubber([]), r"frames=\[\]"),
        (lambda t: show.curve([2, 1], [1, 1], **LABELS), "x=.*increasing"),
        (lambda t: show.curve([1, 2], [1], **LABELS), "ys.shape"),
        (lambda t: show.heat([[1]], "ab", "c", unit="u", **LABELS), "values.shape"),
        (lambda t: show.bars(["a"], [1, 2], title="t", ylabel="y"), "values.shape"),
        (lambda t: show.learning_curve([], title="t"), "histories"),
        (lambda t: show.learning_curve({"step": [1]}, title="t"), "histories.*loss"),
    ],
)
def test_wrong_input_is_named(call, message, trace):
    with pytest.raises(ValueError, match=message):
        call(trace)


def test_a_trace_without_steps_is_refused(trace):
    for name in ("proposed", "logprob", "score", "written", "erased"):
        setattr(trace, name, getattr(trace, name)[:0])
    with pytest.raises(ValueError, match=r"trace\.steps=0"):
        show.strip(trace, LETTERS)


def test_the_library_does_not_import_its_pictures():
    code = (
        "import sys, dlmlib; "
        "print({'matplotlib', 'ipywidgets', 'dlmlib.show'} & sys.modules.keys())"
    )
    run = [sys.executable, "-c", code]
    seen = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert seen.strip() == "set()"
