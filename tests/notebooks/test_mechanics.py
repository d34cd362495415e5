"""Every stored notebook keeps the rules of CONTRIBUTING.md."""

from pathlib import Path

import checks
import pytest

from tools.notebooks import read

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(ROOT.glob("notebooks/*.ipynb"))
SOLUTIONS = sorted(ROOT.glob("notebooks/solutions/*.ipynb"))


@pytest.mark.parametrize("path", [*PAGES, *SOLUTIONS], ids=lambda path: path.stem)
def test_hygiene(path):
    assert checks.hygiene(read(path), path) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_anatomy(path):
    assert checks.anatomy(read(path), path) == []


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_belong_to_a_notebook(path):
    page = path.parents[1] / path.name
    assert page in PAGES
    assert read(path).cells[0].source.startswith(f"# {path.name[:2]}. ")
    assert checks.check_solved(read(path), read(page)) == []


def test_series():
    assert checks.check_names([path.name for path in PAGES]) == []
    pages = {path.name: read(path) for path in PAGES}
    assert checks.check_table((ROOT / "README.md").read_text(), pages) == []
