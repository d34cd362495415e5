"""tools/notebooks.py: what runs, what is stored, what a failure looks like."""

import base64
import io

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from tools import notebooks

PAGE = """\
# 00. A page

It *promises* `much`. Then more.

[index](../README.md) · [next](01_next.ipynb)
"""
WORK = """\
import sys
from IPython.display import HTML, display
from ipywidgets import IntSlider
from tqdm.auto import trange

for _ in trange(3):
    pass
print("a warning", file=sys.stderr)
display(IntSlider())
display(HTML("<b>shown</b>"))
1 + 1"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project folder with one page and its solutions."""
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(notebooks, "BUILD", tmp_path / "build")
    (tmp_path / "notebooks" / "solutions").mkdir(parents=True)
    return tmp_path / "notebooks"


def page(*code: str):
    cells = [new_markdown_cell(PAGE), *(new_code_cell(source) for source in code)]
    return new_notebook(cells=cells)


def test_find_puts_solutions_after_their_notebook(folder):
    for name in ("01_b.ipynb", "00_a.ipynb", "solutions/01_b.ipynb"):
        (folder / name).touch()
    found = [str(path.relative_to(folder)) for path in notebooks.find([])]
    assert found == ["00_a.ipynb", "01_b.ipynb", "solutions/01_b.ipynb"]
    assert notebooks.find(["01"]) == [
        folder / "01_b.ipynb",
        folder / "solutions" / "01_b.ipynb",
    ]
    with pytest.raises(SystemExit, match="no notebook '07'; there are: 00_a, 01_b"):
        notebooks.find(["07"])


def test_title_and_promise_are_plain_text():
    assert notebooks.title(page()) == "00 A page"
    assert notebooks.promise(page()) == "It promises much."


def test_store_writes_clean_outputs(folder, capsys):
    path = folder / "00_a.ipynb"
    before = page(WORK)
    nbformat.write(before, path)
    assert notebooks.store(["00"])
    assert "00 A page … " in capsys.readouterr().out
    after = notebooks.read(path)
    assert [cell.id for cell in after.cells] == [cell.id for cell in before.cells]
    assert after.metadata.dlm.scale == "ci"
    assert set(after.metadata) == {"kernelspec", "language_info", "dlm"}
    cell = after.cells[1]
    assert cell.execution_count == 1 and cell.metadata == {}
    assert [output.data.get("text/html") for output in cell.outputs] == [
        "<b>shown</b>",
        None,
    ]
    assert cell.outputs[1].data == {"text/plain": "2"}


def test_a_failing_notebook_is_not_stored(folder, capsys):
    path = folder / "00_a.ipynb"
    nbformat.write(page("1 / 0"), path)
    text = path.read_text()
    assert not notebooks.store(["00"])
    assert path.read_text() == text
    out = capsys.readouterr().out
    assert "failed" in out and "1 / 0" in out and "ZeroDivisionError" in out


def test_run_goes_on_after_a_failure_and_writes_pages(folder, capsys):
    nbformat.write(page("1 / 0"), folder / "00_a.ipynb")
    nbformat.write(page("print('fine')"), folder / "solutions" / "00_a.ipynb")
    assert not notebooks.run([])
    build = folder.parent / "build"
    index = (build / "index.html").read_text()
    assert index.count("It promises much.") == 2
    assert index.index("failed") < index.index("passed")
    assert "ZeroDivisionError" in (build / "00_a.html").read_text()
    solutions = (build / "solutions" / "00_a.html").read_text()
    assert "fine" in solutions
    assert 'href="index.html"' in solutions and 'href="01_next.html"' in solutions
    executed = notebooks.read(build / "notebooks" / "00_a.ipynb")
    assert executed.cells[1].outputs[0].ename == "ZeroDivisionError"


def test_a_cell_that_may_raise_passes(folder):
    notebook = page("1 / 0", "assert 1 == 1")
    notebook.cells[1].metadata["tags"] = ["raises-exception"]
    nbformat.write(notebook, folder / "00_a.ipynb")
    assert notebooks.store(["00"])
    stored = notebooks.read(folder / "00_a.ipynb")
    assert stored.cells[1].metadata.tags == ["raises-exception"]
    assert [cell.execution_count for cell in stored.cells[1:]] == [1, 2]


def display(**data):
    return new_output("display_data", data={notebooks.WIDGET: {}, **data})


@pytest.mark.parametrize(
    ("fallback", "kept"),
    [
        ({"text/plain": "VBox(children=(…))"}, None),
        ({"text/plain": "  0%|          | 0/3 [00:00<?, ?it/s]"}, None),
        ({"text/plain": "t = 0.5: the ░ sat"}, {"text/plain": "t = 0.5: the ░ sat"}),
        ({"text/html": "<b>x</b>"}, {"text/html": "<b>x</b>"}),
        ({}, None),
    ],
)
def test_a_widget_leaves_its_readable_fallback(fallback, kept):
    output = display(**fallback)
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[output])])
    notebooks.clean(notebook)
    expected = [] if kept is None else [kept]
    assert [output.data for output in notebook.cells[0].outputs] == expected


def test_missing_and_repeated_ids_become_stable():
    notebook = page("1", "2", "3")
    notebook.cells[1].pop("id")
    notebook.cells[3].id = notebook.cells[2].id
    notebooks.unique_ids(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert ids[1] == "cell-1" and ids[3] == "cell-3" and len(set(ids)) == 4


def test_pictures_get_smaller_and_look_the_same():
    """A heat map with labels: fewer bytes, and no pixel more than a few shades off."""
    figure = Figure(figsize=(6, 3), dpi=100)
    ax = figure.subplots()
    ax.imshow(np.random.default_rng(0).random((8, 16)))
    ax.set_title("What a reader sees")
    stored = io.BytesIO()
    figure.savefig(stored, format="png")
    text = base64.b64encode(stored.getvalue()).decode()
    small = notebooks.smaller(text)
    assert len(small) < 0.7 * len(text)
    assert notebooks.smaller(small) == small
    before, after = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
        for png in (text, small)
    )
    off = np.abs(before.astype(int) - after)
    assert off.mean() < 1 and (off > 16).mean() < 0.01


def test_pieces_of_a_stream_are_joined():
    pieces = [new_output("stream", name="stdout", text=t) for t in ("a\n", "b\n")]
    picture = new_output("display_data", data={"text/plain": "x"})
    last = new_output("stream", name="stdout", text="c")
    outputs = notebooks.joined([*pieces, picture, last])
    assert [o.get("text") for o in outputs] == ["a\nb\n", None, "c"]
