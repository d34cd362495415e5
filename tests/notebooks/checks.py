"""The rules of a stored notebook; every check returns a list of problems."""

import ast
import re
from pathlib import Path

import nbformat

from tools.notebooks import KERNEL, WIDGET, title

HEADER = ("You will be able to", "Prerequisites", "Time", "Downloads")
ENDING = ("Takeaways", "Exercises", "References", "Next")
FORBIDDEN = {
    r"(?m)^\s*[!%]+\s*(pip|conda)\b": "installs packages",
    r"\bsys\.path\b": "touches sys.path",
    r"\bos\.chdir\b": "changes the folder",
}
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/])/(?:home|root|Users|tmp|private|mnt|opt|usr|var|work|content)/"
    r"|\b[A-Z]:\\\w"
)
MAX_BYTES, MAX_LINE, MAX_LINES, MIN_EXERCISES = 1_000_000, 88, 40, 2


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook) -> str:
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def described(cell) -> str:
    """A cell as a problem names it: its id and its first line."""
    return f"cell {cell.get('id', '?')} ({cell.source.partition(chr(10))[0][:40]!r})"


# Hygiene: every notebook, solutions included


def check_format(notebook) -> list[str]:
    problems = []
    if notebook.metadata.get("kernelspec") != KERNEL:
        problems.append(f"kernelspec is not {KERNEL}")
    if notebook.metadata.get("language_info") != {"name": "python"}:
        problems.append("language_info is more than the name")
    if "widgets" in notebook.metadata:
        problems.append("metadata.widgets is stored")
    ids = [cell.get("id") for cell in notebook.cells]
    if len(set(ids)) != len(ids) or None in ids:
        return [*problems, "cell ids are missing or not unique"]
    try:
        nbformat.validate(notebook)  # repairs ids, so it comes after them
    except nbformat.ValidationError as error:
        problems.append(f"not a valid notebook: {error.message}")
    return problems


def check_size(path: Path) -> list[str]:
    size = path.stat().st_size
    return [f"{size} bytes: at most {MAX_BYTES}"] if size > MAX_BYTES else []


def check_execution(notebook) -> list[str]:
    """Stored from one run, top to bottom."""
    counts = [c.execution_count for c in code_cells(notebook) if c.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        return [f"execution counts are {counts}, not 1..{len(counts)}"]
    return []


def check_outputs(notebook) -> list[str]:
    problems = []
    for cell in code_cells(notebook):
        may_raise = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.outputs:
            if output.get("name") == "stderr":
                problems.append(f"{described(cell)} writes to stderr")
            if output.output_type == "error" and not may_raise:
                problems.append(f"{described(cell)} raises {output.ename}")
            if WIDGET in output.get("data", {}):
                problems.append(f"{described(cell)} stores a live widget")
    return problems


def texts(cell) -> str:
    """Everything in a cell that a person reads, outputs included."""
    parts = [cell.source]
    for output in cell.get("outputs", []):
        parts += [output.get("text", ""), *output.get("traceback", [])]
        data = output.get("data", {})
        parts += [text for kind, text in data.items() if kind.startswith("text/")]
    return "\n".join(parts)


def check_paths(notebook) -> list[str]:
    return [
        f"{described(cell)} names an absolute path: {found[0]}…"
        for cell in notebook.cells
        if (found := ABSOLUTE_PATH.search(texts(cell)))
    ]


def check_code(notebook) -> list[str]:
    problems = []
    for cell in code_cells(notebook):
        lines = cell.source.splitlines()
        if len(lines) > MAX_LINES:
            problems.append(f"{described(cell)} has {len(lines)} lines")
        if max(map(len, lines), default=0) > MAX_LINE:
            problems.append(f"{described(cell)} has a line over {MAX_LINE} characters")
        for pattern, complaint in FORBIDDEN.items():
            if re.search(pattern, cell.source):
                problems.append(f"{described(cell)} {complaint}")
        if _parse(cell) is None:
            problems.append(f"{described(cell)} is not Python")
    return problems


def _parse(cell) -> ast.Module | None:
    try:
        return ast.parse(cell.source)
    except SyntaxError:
        return None


def check_asserts(notebook) -> list[str]:
    trees = [tree for cell in code_cells(notebook) if (tree := _parse(cell))]
    nodes = (node for tree in trees for node in ast.walk(tree))
    asserts = any(isinstance(node, ast.Assert) for node in nodes)
    return [] if asserts else ["asserts nothing"]


def check_images(notebook) -> list[str]:
    """Every image of the prose has an alternative text."""
    text = markdown(notebook)
    bare = re.findall(r"!\[\s*\]\([^)]*\)", text)
    bare += [tag for tag in re.findall(r"<img[^>]*>", text) if not _has_alt(tag)]
    return [f"no alternative text: {image}" for image in bare]


def _has_alt(tag: str) -> bool:
    return bool(re.search(r"""\balt=(["']).+?\1""", tag))


def check_links(notebook, path: Path) -> list[str]:
    """Every link to a file leads to one."""
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", markdown(notebook))
    local = [link for link in links if not re.match(r"\w+:", link)]
    return [f"broken link: {x}" for x in local if not (path.parent / x).exists()]


def hygiene(notebook, path: Path) -> list[str]:
    """The rules that hold for notebooks and solutions alike."""
    return [
        *check_format(notebook),
        *check_size(path),
        *check_execution(notebook),
        *check_outputs(notebook),
        *check_paths(notebook),
        *check_code(notebook),
        *check_asserts(notebook),
        *check_images(notebook),
        *check_links(notebook, path),
    ]


# Anatomy: the notebooks of the series


def check_first_cell(notebook, path: Path) -> list[str]:
    """`# NN. Title`, and links to the previous page, the index and the next page."""
    first, problems = notebook.cells[0].source, []
    number = path.name[:2]
    if not re.match(rf"# {number}\. \S", first):
        problems.append(f"the first cell does not start with '# {number}. Title'")
    names = sorted(other.name for other in path.parent.glob("*.ipynb"))
    place = names.index(path.name)
    wanted = ["../README.md", *names[max(place - 1, 0) : place + 2]]
    wanted.remove(path.name)
    problems += [
        f"the first cell does not link to {target}"
        for target in wanted
        if f"]({target})" not in first
    ]
    return problems


def check_sections(notebook) -> list[str]:
    second = notebook.cells[1].source if len(notebook.cells) > 1 else ""
    missing = [name for name in HEADER if name not in second]
    text = markdown(notebook)
    for name in ENDING:
        if not re.search(rf"(?m)^(?:#+ |\*+){name}\b", text):
            missing.append(name)
    return [f"section missing: {name}" for name in missing]


def check_exercises(notebook, path: Path) -> list[str]:
    problems = []
    count = len(re.findall(r"(?m)^#+ .*\bExercise\b", markdown(notebook)))
    if count < MIN_EXERCISES:
        problems.append(f"{count} exercises: at least {MIN_EXERCISES}")
    if not (path.parent / "solutions" / path.name).exists():
        problems.append(f"no solutions/{path.name}")
    return problems


def stated_seconds(notebook) -> float | None:
    """The CPU time of the header: '… / run on CPU 70 s / run on GPU 20 s'."""
    second = notebook.cells[1].source if len(notebook.cells) > 1 else ""
    for part in re.split(r"[/·,;\n]", second):
        found = re.search(r"(\d+(?:\.\d+)?)\s*(s|min)\b", part)
        if "CPU" in part and found:
            return float(found[1]) * {"s": 1, "min": 60}[found[2]]
    return None


def check_time(notebook) -> list[str]:
    """The stated time is within a factor of two of the measured one."""
    stated, measured = stated_seconds(notebook), notebook.metadata.get("dlm", {})
    if stated is None:
        return ["the second cell states no CPU time, such as 'run on CPU 70 s'"]
    if measured.get("scale") != "laptop" or "seconds" not in measured:
        return ["not stored at the laptop scale: `make store NB=…`"]
    if not measured["seconds"] / 2 <= stated <= measured["seconds"] * 2:
        return [f"states {stated:.0f} s, took {measured['seconds']} s"]
    return []


def anatomy(notebook, path: Path) -> list[str]:
    """The rules of a page of the series."""
    return [
        *check_first_cell(notebook, path),
        *check_sections(notebook),
        *check_exercises(notebook, path),
        *check_time(notebook),
    ]


# Solutions: checked by the very functions that the page shows


def exercise_checks(notebook) -> dict[str, str]:
    """Name -> code of every `check_…` function."""
    trees = [tree for cell in code_cells(notebook) if (tree := _parse(cell))]
    found = (node for tree in trees for node in tree.body)
    return {
        node.name: ast.unparse(node)
        for node in found
        if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
    }


def check_solved(solutions, page) -> list[str]:
    """Every exercise check of the page is in its solutions, word for word."""
    solved, asked = exercise_checks(solutions), exercise_checks(page)
    missing = [f"{name} is not solved" for name in asked if name not in solved]
    changed = [f"{n} differs" for n in asked if solved.get(n, asked[n]) != asked[n]]
    return [*missing, *changed] if asked else ["the page has no check_… function"]


# The series


def check_names(names: list[str]) -> list[str]:
    """NN_title.ipynb, each number once, from 00; numbers are the series' own."""
    pattern = r"\d\d_[a-z0-9_]+\.ipynb"
    problems = [f"name: {x}" for x in names if not re.fullmatch(pattern, x)]
    numbers = sorted(name[:2] for name in names)
    if numbers[:1] != ["00"] or len(set(numbers)) != len(numbers):
        problems.append(f"numbers are {numbers}, not each once from 00")
    return problems


def check_table(readme: str, notebooks: dict) -> list[str]:
    """README's rows `| NN | [Title](notebooks/NN_….ipynb) | sentence |`."""
    marked = re.search(r"<!-- notebooks -->(.*)<!-- /notebooks -->", readme, re.DOTALL)
    if not marked:
        return ["README.md has no <!-- notebooks --> … <!-- /notebooks --> markers"]
    row = r"(?m)^\| (\d\d) \| \[(.+?)\]\(notebooks/(\S+?)\) \| \S.* \|$"
    listed = [(name, f"{n} {head}") for n, head, name in re.findall(row, marked[1])]
    there = [(name, title(notebooks[name])) for name in sorted(notebooks)]
    only_listed = [f"only in README.md: {x}" for x in listed if x not in there]
    only_there = [f"not in README.md: {x}" for x in there if x not in listed]
    ordered = [] if listed == sorted(listed) else ["README.md: rows out of order"]
    return only_listed + only_there + ordered
