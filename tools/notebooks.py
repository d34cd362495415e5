"""Run the notebooks headless, or run one and store its outputs in place.

    python -m tools.notebooks run [NN ...]     executed copies and pages in build/
    python -m tools.notebooks store NN [...]   clean outputs, written to the notebook

NN selects a notebook and its solutions; without it all run, in order.
"""

import argparse
import base64
import html
import io
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import (
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
)
from nbconvert import HTMLExporter
from PIL import Image

from dlmlib.device import current_scale

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
ANSI = re.compile(r"\x1b\[[0-9;]*m")
PAGE = """\
<!doctype html><html lang="en"><meta charset="utf-8"><title>dlmlib notebooks</title>
<style>
  body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto }}
  td {{ padding: .2em 1em .2em 0; vertical-align: top }}
</style>
<h1>Notebooks</h1><table>{rows}</table></html>
"""
ROW = (
    '<tr><td><a href="{link}">{title}</a></td><td>{promise}</td>'
    "<td>{seconds}&nbsp;s</td><td>{status}</td></tr>"
)


# Which notebooks


def find(selection: list[str]) -> list[Path]:
    """The selected notebooks, each followed by its solutions."""
    paths = sorted(
        [*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("solutions/*.ipynb")],
        key=lambda path: (path.name, path.parent.name == "solutions"),
    )
    names = ", ".join(path.stem for path in paths if path.parent == NOTEBOOKS)
    for number in selection:
        if not any(path.name.startswith(number) for path in paths):
            sys.exit(f"no notebook {number!r}; there are: {names or 'none'}")
    chosen = tuple(selection) or ("",)
    return [path for path in paths if path.name.startswith(chosen)]


def read(path: Path):
    """A notebook as it is stored: nbformat.read would repair it silently."""
    return nbformat.v4.reads(path.read_text(encoding="utf-8"))


def title(notebook) -> str:
    """The first heading, without its mark and the dot after the number."""
    heading = re.search(r"^# (.+)$", notebook.cells[0].source, re.MULTILINE)
    return re.sub(r"^(\d\d)\.", r"\1", heading[1]) if heading else "untitled"


def promise(notebook) -> str:
    """The first sentence under the title, without markup."""
    text = re.sub(r"^# .+\n+", "", notebook.cells[0].source)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|[*_`]", r"\1", text)
    return re.match(r".*?(?:[.!?](?=\s|$)|$)", " ".join(text.split()))[0]


# Execution


def unique_ids(notebook) -> None:
    """Keep cell ids; name a cell by its position where the id is missing or used."""
    notebook.nbformat_minor = 5  # the first with cell ids
    used = set()
    for index, cell in enumerate(notebook.cells):
        if not cell.get("id") or cell.id in used:
            cell.id = f"cell-{index}"
        used.add(cell.id)


def execute(notebook, folder: Path) -> tuple[int, str]:
    """Run every cell in `folder`; returns the seconds and the error, '' for none."""
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    start, error = time.monotonic(), ""
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
        error = str(failure)
    return round(time.monotonic() - start), error


def run_one(path: Path):
    """Execute one notebook with a progress line; returns it and whether it passed."""
    notebook = read(path)
    unique_ids(notebook)
    print(f"{title(notebook)} … ", end="", flush=True)
    seconds, error = execute(notebook, path.parent)
    status = "failed" if error else "passed"
    print(f"{seconds} s  {status}", flush=True)
    if error:
        print(error if sys.stdout.isatty() else ANSI.sub("", error), flush=True)
    notebook.metadata["dlm"] = {"seconds": seconds, "scale": current_scale()}
    return notebook, not error


# Clean outputs


def clean(notebook) -> list[str]:
    """Remove what a stored notebook must not hold; returns the stderr texts."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": KERNEL,
            "language_info": {"name": "python"},
            "dlm": notebook.metadata.get("dlm", {}),
        }
    )
    warnings = []
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in ("tags",) if cell.metadata.get(key)}
        )
        if cell.cell_type == "code":
            warnings += [o.text for o in cell.outputs if o.get("name") == "stderr"]
            cell.outputs = joined(o for o in cell.outputs if _keep(o))
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    return warnings


def joined(outputs) -> list:
    """Consecutive pieces of one stream as one output, however they arrived."""
    result = []
    for output in outputs:
        last = result[-1] if result else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            result.append(output)
    return result


def smaller(png: str) -> str:
    """The picture in 256 colours: a third of the bytes, and plots look the same."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        if picture.mode == "P":  # made smaller before
            return png
        flat = Image.new("RGB", picture.size, "white")
        flat.paste(picture, mask=picture.convert("RGBA").getchannel("A"))
    stored = io.BytesIO()
    few = flat.quantize(256, dither=Image.Dither.NONE)
    few.save(stored, "PNG", optimize=True, dpi=picture.info.get("dpi", (150, 150)))
    text = base64.b64encode(stored.getvalue()).decode()
    return min(png, text, key=len)


def _keep(output) -> bool:
    """Drop stderr and widgets; of a widget keep its HTML or plain-text fallback."""
    if output.get("name") == "stderr":
        return False
    if WIDGET not in output.get("data", {}):
        return True
    del output.data[WIDGET]
    plain = output.data.get("text/plain", "")
    is_repr = re.match(r"\w+\(|\s*\d+%\||Output\(\)", plain)  # VBox(…), 0%|
    if is_repr and "text/html" not in output.data:
        return False
    return bool(output.data)


def write(path: Path, text: str) -> None:
    """Write a file at once, so that an interrupted run loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_notebook(notebook, path: Path) -> None:
    write(path, nbformat.writes(notebook) + "\n")


# Pages


def render(notebook, source: Path) -> Path:
    """Write the executed notebook as a page in build/ whose links stay inside it."""
    relative = source.relative_to(NOTEBOOKS).with_suffix(".html")
    resources = {"metadata": {"path": str(source.parent), "name": source.stem}}
    exporter = HTMLExporter(embed_images=True)
    body, _ = exporter.from_notebook_node(notebook, resources)
    body = re.sub(r'(href="(?!http)[^"]*)\.ipynb', r"\1.html", body)
    body = re.sub(r'href="((?:\.\./)*)\.\./README\.md', r'href="\1index.html', body)
    write(BUILD / relative, body)
    return relative


def write_index(rows: list[dict]) -> None:
    """Write build/index.html: title, first sentence, time and status of each."""
    safe = [{key: html.escape(str(text)) for key, text in r.items()} for r in rows]
    table = "\n".join(ROW.format(**row) for row in safe)
    write(BUILD / "index.html", PAGE.format(rows=table))


# Commands


def run(selection: list[str]) -> bool:
    """Execute into build/; a failure does not stop the notebooks after it."""
    rows, all_passed = [], True
    for path in find(selection):
        notebook, passed = run_one(path)
        write_notebook(notebook, BUILD / path.relative_to(ROOT))
        rows.append(
            {
                "link": render(notebook, path),
                "title": title(notebook),
                "promise": promise(notebook),
                "seconds": notebook.metadata.dlm["seconds"],
                "status": "passed" if passed else "failed",
            }
        )
        write_index(rows)
        all_passed &= passed
    print(f"pages: {(BUILD / 'index.html').relative_to(ROOT)}")
    return all_passed


def store(selection: list[str]) -> bool:
    """Execute and overwrite the notebooks that pass, with clean outputs."""
    all_passed = True
    for path in find(selection):
        notebook, passed = run_one(path)
        all_passed &= passed
        if passed:
            for warning in clean(notebook):
                print(f"dropped from stderr: {warning.strip()}")
            write_notebook(notebook, path)
    return all_passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "store"])
    parser.add_argument("notebooks", nargs="*", metavar="NN", help="such as 02")
    arguments = parser.parse_args()
    command = {"run": run, "store": store}[arguments.command]
    sys.exit(not command(arguments.notebooks))


if __name__ == "__main__":
    main()
