"""Remake the shipped checkpoints and keep their list in data/README.md true."""

import argparse
import hashlib
from pathlib import Path

from dlmlib.device import pick_device
from dlmlib.training.checkpoints import read_info
from dlmlib.training.recipes import RECIPES, build, checkpoint_path, data_folders, make

COMMAND = "python -m dlmlib.training.shipping"
BEGIN, END = "<!-- checkpoints: begin -->", "<!-- checkpoints: end -->"
HEADER = "| File | What | Bytes | sha256 | Made by |\n|---|---|---|---|---|"


def main(arguments: list[str] | None = None) -> None:
    """Train recipes from the start, save them in the data folder, update its list.

    Args:
        arguments: of the command line: names of recipes; none for all of them.

    Introduced in notebook 02.
    """
    parser = argparse.ArgumentParser(prog=COMMAND, description="Remake checkpoints.")
    known = ", ".join(sorted(RECIPES))
    parser.add_argument("names", nargs="*", help=f"default: all of {known}")
    names = parser.parse_args(arguments).names or list(RECIPES)
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"unknown recipe {unknown[0]!r}: expected one of {known}")
    folder = data_folders()[0]
    for name in names:
        task, model = build(RECIPES[name])
        result = make(RECIPES[name], model.to(pick_device().device), task, folder)
        path = checkpoint_path(folder, name)
        loss = read_info(path)["loss"]
        print(
            f"{path}: {path.stat().st_size:,} bytes, sha256 {sha256(path)}, "
            f"{result.seconds:.0f} s, {loss:.4f} nats per token"
        )
        update_list(folder)


def update_list(folder: Path) -> None:
    """Write the table of checkpoints between the markers of `folder`/README.md.

    Without the markers, the table is added at the end.
    """
    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else "# Data\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## Checkpoints\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    rows = [row(path) for path in shipped(folder) if path.stem in RECIPES]
    table = "\n".join([HEADER, *rows])
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def row(path: Path) -> str:
    """The line of the list about one checkpoint."""
    name, size = path.stem, path.stat().st_size
    facts = RECIPES[name].description, f"{size:,}", f"`{sha256(path)}`"
    return f"| {path.name} | {' | '.join(facts)} | `{COMMAND} {name}` |"


def complaints(folder: Path) -> list[str]:
    """What is wrong with the checkpoints of a data folder; empty if nothing is."""
    readme = folder / "README.md"
    listed = readme.read_text() if readme.exists() else ""
    found = []
    for path in shipped(folder):
        if path.stem not in RECIPES:
            found.append(f"{path.name}: no recipe of this name")
        elif read_info(path)["recipe"] != RECIPES[path.stem].hash:
            found.append(f"{path.name}: not made by the recipe as it is now")
        elif row(path) not in listed:
            found.append(f"{path.name}: not as listed in README.md")
    return found


def shipped(folder: Path) -> list[Path]:
    """The checkpoints of a data folder."""
    return sorted((folder / "checkpoints").glob("*.safetensors"))


def sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
