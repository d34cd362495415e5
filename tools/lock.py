"""Write constraints.txt: every package of the project and its extras, at one version.

Needs only a Python with pip; nothing is installed. `make lock` runs it with the torch
that the Makefile names; all other packages are resolved to their newest versions.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# Every package of dlmlib with the extras notebooks and test, at one version.
# Written by `make lock` on Linux; do not edit. The packages of the CUDA build of
# torch (nvidia-*, cuda-*, triton) are missing on purpose: torch pins them itself.
"""
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")


def normalise(name: str) -> str:
    """The canonical spelling of a package name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(requirements: list[str]) -> list[dict]:
    """What pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        pip = [sys.executable, "-m", "pip", "install", "--dry-run"]
        options = ["--ignore-installed", "--quiet", "--report", str(report)]
        subprocess.run([*pip, *options, *requirements], check=True, cwd=ROOT)
        return json.loads(report.read_text())["install"]


def pins(installed: list[dict]) -> dict[str, str]:
    """Name -> version, without local labels such as +cpu and the project itself."""
    found = {}
    for item in installed:
        name = normalise(item["metadata"]["name"])
        local_project = "dir_info" in item["download_info"]
        if not local_project and not name.startswith(PINNED_BY_TORCH):
            found[name] = item["metadata"]["version"].partition("+")[0]
    return found


def main() -> None:
    found = pins(resolve([".[notebooks,test]", *sys.argv[1:]]))
    lines = [f"{name}=={version}" for name, version in sorted(found.items())]
    Path(ROOT, "constraints.txt").write_text(HEADER + "\n".join(lines) + "\n")
    print(f"constraints.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
