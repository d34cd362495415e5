"""The checks accept a good notebook and name what is wrong with a broken one."""

import checks
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.notebooks import read

TITLE = """# 01. The title

A promise.

[previous](00_start.ipynb) · [index](../README.md) · [next](02_more.ipynb)
"""
HEADER = """**You will be able to** do it · **Prerequisites** none
· **Time** read 10 min / run on CPU 60 s / run on GPU 20 s · **Downloads** 0 MB
"""
ENDING = """## Takeaways

## Exercises

### Exercise 1
### Exercise 2

## References

## Next
"""
STDERR = new_output("stream", name="stderr", text="a warning")
ERROR = new_output("error", ename="ValueError", evalue="no", traceback=["no"])
LIVE = new_output("display_data", data={checks.WIDGET: {}, "text/plain": "VBox()"})
UNKNOWN = nbformat.from_dict(
    {"output_type": "stream", "name": "stdout", "text": "x", "colour": "red"}
)
LEAK = new_output("stream", name="stdout", text="in /home/me/dlm/x.py")


def good_notebook():
    code = ("assert 1 + 1 == 2", "print('two')")
    cells = [
        new_markdown_cell(TITLE),
        new_markdown_cell(HEADER),
        *(new_code_cell(line, execution_count=n) for n, line in enumerate(code, 1)),
        new_markdown_cell(ENDING),
    ]
    notebook = new_notebook(cells=cells)
    notebook.metadata.update(
        kernelspec=dict(checks.KERNEL),
        language_info={"name": "python"},
        dlm={"seconds": 60, "scale": "laptop"},
    )
    return notebook


@pytest.fixture
def series(tmp_path):
    """A folder with three pages and solutions; yields the path of the middle one."""
    (tmp_path / "README.md").touch()
    solutions = tmp_path / "notebooks" / "solutions"
    solutions.mkdir(parents=True)
    for name in ("00_start.ipynb", "01_the_title.ipynb", "02_more.ipynb"):
        nbformat.write(good_notebook(), tmp_path / "notebooks" / name)
        nbformat.write(good_notebook(), solutions / name)
    return tmp_path / "notebooks" / "01_the_title.ipynb"


def problems(notebook, path) -> list[str]:
    return checks.hygiene(notebook, path) + checks.anatomy(notebook, path)


def test_a_good_notebook_has_no_problems(series):
    assert problems(good_notebook(), series) == []


def put(attribute, value, cell=3):
    return lambda notebook: notebook.cells[cell].update({attribute: value})


def meta(**entries):
    return lambda notebook: notebook.metadata.update(entries)


def say(old, new):
    def change(notebook):
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)

    return change


BROKEN = {
    "kernel": (meta(kernelspec={"name": "other"}), "kernelspec"),
    "language": (meta(language_info={"name": "python", "version": "3"}), "language"),
    "widget state": (meta(widgets={}), "metadata.widgets"),
    "same id": (lambda nb: put("id", nb.cells[2].id)(nb), "unique"),
    "no id": (lambda nb: nb.cells[3].pop("id"), "ids are missing"),
    "not the format": (put("outputs", [UNKNOWN]), "not a valid notebook"),
    "not run": (put("execution_count", None), "execution counts"),
    "run out of order": (put("execution_count", 7), "execution counts"),
    "stderr": (put("outputs", [STDERR]), "writes to stderr"),
    "error": (put("outputs", [ERROR]), "raises ValueError"),
    "live widget": (put("outputs", [LIVE]), "live widget"),
    "path in an output": (put("outputs", [LEAK]), "absolute path: /home/"),
    "path in the code": (put("source", "open('/tmp/x')"), "absolute path: /tmp/"),
    "path in the prose": (say("A promise", r"In C:\Users"), r"absolute path: C:\U"),
    "pip": (put("source", "!pip install x"), "installs packages"),
    "pip magic": (put("source", "%pip install x"), "installs packages"),
    "sys.path": (put("source", "import sys; sys.path.append('.')"), "sys.path"),
    "chdir": (put("source", "import os; os.chdir('..')"), "changes the folder"),
    "syntax": (put("source", "def stub(:"), "not Python"),
    "magic": (put("source", "%matplotlib inline"), "not Python"),
    "long line": (put("source", "x = " + "1" * 85), "over 88"),
    "long cell": (put("source", "x = 1\n" * 41), "41 lines"),
    "no assert": (say("assert 1 + 1 == 2", "1 + 1"), "asserts nothing"),
    "commented assert": (say("assert 1", "# assert 1"), "asserts nothing"),
    "image": (say("A promise", "![](x.png)"), "alternative text"),
    "image tag": (say("A promise", '<img src="x.png" alt="">'), "alternative text"),
    "broken link": (say("A promise", "[see](gone.ipynb)"), "broken link: gone.ipynb"),
    "title": (say("# 01. The", "# 1 The"), "'# 01. Title'"),
    "wrong number": (say("# 01. The", "# 02. The"), "'# 01. Title'"),
    "previous": (say("](00_start.ipynb)", "](../README.md)"), "link to 00_start.ipynb"),
    "next": (say("](02_more.ipynb)", "](../README.md)"), "link to 02_more.ipynb"),
    "index": (say("](../README.md)", "](00_start.ipynb)"), "link to ../README.md"),
    "downloads": (say("**Downloads** 0 MB", ""), "section missing: Downloads"),
    "takeaways": (say("## Takeaways", ""), "section missing: Takeaways"),
    "next section": (say("## Next", "next"), "section missing: Next"),
    "one exercise": (say("### Exercise 2", ""), "1 exercises"),
    "no CPU time": (say("on CPU 60 s", "quickly"), "states no CPU time"),
    "too slow": (say("CPU 60 s", "CPU 29 s"), "states 29 s, took 60 s"),
    "too fast": (say("CPU 60 s", "CPU 3 min"), "states 180 s, took 60 s"),
    "other scale": (meta(dlm={"seconds": 60, "scale": "ci"}), "laptop scale"),
    "never stored": (meta(dlm={}), "laptop scale"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_notebook_is_named(name, series):
    break_it, complaint = BROKEN[name]
    notebook = good_notebook()
    break_it(notebook)
    assert any(complaint in problem for problem in problems(notebook, series))


def test_a_cell_may_raise_where_it_says_so():
    notebook = good_notebook()
    notebook.cells[3].update(outputs=[ERROR], metadata={"tags": ["raises-exception"]})
    assert checks.check_outputs(notebook) == []


@pytest.mark.parametrize(
    "text", ["p/(1-p)", "https://x.org/home/a", "a/tmp/b", "and/or"]
)
def test_a_slash_is_not_an_absolute_path(text):
    notebook = good_notebook()
    notebook.cells[0].source += text
    assert checks.check_paths(notebook) == []


def test_a_file_over_a_megabyte_is_too_large(tmp_path):
    path = tmp_path / "large.ipynb"
    path.write_bytes(b" " * 1_000_001)
    assert checks.check_size(path) == ["1000001 bytes: at most 1000000"]


def test_duplicate_ids_are_seen_in_a_file(series):
    notebook = good_notebook()
    text = nbformat.writes(notebook).replace(notebook.cells[3].id, notebook.cells[2].id)
    series.write_text(text)
    found = checks.check_format(read(series))
    assert found == ["cell ids are missing or not unique"]


def test_missing_solutions_are_named(series):
    (series.parent / "solutions" / series.name).unlink()
    assert problems(good_notebook(), series) == [f"no solutions/{series.name}"]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("read 5 min / run on CPU 70 s / run on GPU 20 s", 70),
        ("10 min to read · 1.5 min to run on two CPU cores", 90),
        ("read 10 min", None),
    ],
)
def test_stated_seconds(time, seconds):
    notebook = good_notebook()
    notebook.cells[1].source = f"**Time**: {time}"
    assert checks.stated_seconds(notebook) == seconds


@pytest.mark.parametrize(
    "names",
    [
        ["01_a.ipynb"],
        ["00_a.ipynb", "00_b.ipynb"],
        ["00_a.ipynb", "01_B b.ipynb"],
    ],
)
def test_odd_and_repeated_names_are_named(names):
    assert checks.check_names(names)


def test_names_of_the_series_pass_gaps_included():
    """A number belongs to its chapter for good, whether or not the others are there."""
    assert checks.check_names(["00_a.ipynb", "01_b_2.ipynb", "06_c.ipynb"]) == []


ROW = "| 01 | [The title](notebooks/01_the_title.ipynb) | A promise. |\n"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ROW, []),
        ("", ["not in README.md"]),
        (
            ROW.replace("The title", "A title"),
            ["only in README.md", "not in README.md"],
        ),
        (ROW.replace("| A promise. |", "| |"), ["not in README.md"]),
        (ROW + ROW.replace("01", "02"), ["only in README.md"]),
        (ROW.replace("01", "02") + ROW, ["only in README.md", "rows out of order"]),
    ],
)
def test_table_and_folder_agree(rows, expected):
    readme = f"<!-- notebooks -->\n{rows}<!-- /notebooks -->"
    found = checks.check_table(readme, {"01_the_title.ipynb": good_notebook()})
    assert len(found) == len(expected)
    assert all(start in text for start, text in zip(expected, found, strict=True))


def test_a_readme_without_a_table_is_named():
    assert checks.check_table("", {}) != []


CHECK = "def check_sum(attempt):\n    assert attempt(1, 1) == 2, 'add them'"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (CHECK.replace("'", '"'), []),
        (CHECK.replace("== 2", "== 3"), ["check_sum differs"]),
        ("1 + 1", ["check_sum is not solved"]),
    ],
)
def test_solutions_use_the_checks_of_the_page(code, expected):
    asked, solved = (new_notebook(cells=[new_code_cell(x)]) for x in (CHECK, code))
    assert checks.check_solved(solved, asked) == expected


def test_a_page_without_checks_is_named():
    assert checks.check_solved(good_notebook(), good_notebook()) != []
