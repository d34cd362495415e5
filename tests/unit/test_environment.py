"""environment.yml, pyproject.toml, Makefile and constraints.txt tell one story."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tools.lock import PINNED_BY_TORCH, normalise

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("notebooks", "test")
LINUX = {  # the lock is made on Linux; macOS adds a package or two of its own
    **default_environment(),
    "sys_platform": "linux",
    "platform_system": "Linux",
}


def pin_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    return dict(line.split("==") for line in pin_lines())


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(project: dict) -> list[Requirement]:
    """Every requirement of pyproject.toml, extras included."""
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return [Requirement(line) for line in lines]


def needs(requirement: Requirement) -> Iterator[Requirement]:
    """What an installed package asks for on Linux with this Python."""
    for line in distribution(requirement.name).requires or ():
        child = Requirement(line)
        for extra in ("", *requirement.extras):
            environment = {**LINUX, "extra": extra}
            if child.marker is None or child.marker.evaluate(environment):
                yield child
                break


def installed_closure(queue: list[Requirement]) -> dict[str, str]:
    """Name -> installed version of everything that the requirements pull in."""
    found, seen = {}, set()
    while queue:
        requirement = queue.pop()
        name = normalise(requirement.name)
        key = (name, *sorted(requirement.extras))
        if key in seen or name.startswith(PINNED_BY_TORCH):
            continue
        seen.add(key)
        found[name] = distribution(name).version.partition("+")[0]
        queue += needs(requirement)
    return found


def test_lock_has_one_exact_sorted_public_line_per_package():
    lines = pin_lines()
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_extras_are_those_that_every_installer_names(project):
    assert tuple(sorted(project["optional-dependencies"])) == EXTRAS
    assert f".[{','.join(EXTRAS)}]" in (ROOT / "Makefile").read_text()


def test_every_declared_dependency_is_pinned_at_an_allowed_version(project, pins):
    for requirement in declared(project):
        name = normalise(requirement.name)
        assert name in pins, f"{name} is not in constraints.txt: run `make lock`"
        version = pins[name]
        assert requirement.specifier.contains(version), f"{requirement}: {version}"


def test_everything_installed_is_pinned_at_its_version(project, pins):
    closure = installed_closure(declared(project))
    assert len(closure) > 100
    assert closure.items() - pins.items() == set(), "install again or run `make lock`"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the lock is for 3.11")
def test_lock_holds_nothing_that_is_not_needed(project, pins):
    assert pins.keys() - installed_closure(declared(project)).keys() == set()


def test_torch_of_the_makefile_is_the_torch_of_the_lock(pins):
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"torch==(\S+)", makefile) == [pins["torch"]]


def test_conda_environment_installs_the_same(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, through_pip = environment["dependencies"]
    assert packages == ["python" + project["requires-python"], "pip"]
    assert through_pip == {"pip": ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]}


def test_makefile_asks_for_the_python_of_the_project(project):
    minimum = SpecifierSet(project["requires-python"])
    major, minor = re.search(
        r"sys\.version_info < \((\d+), (\d+)\)", (ROOT / "Makefile").read_text()
    ).groups()
    assert minimum == SpecifierSet(f">={major}.{minor}")


def test_the_library_alone_needs_no_jupyter_and_no_matplotlib(project):
    alone = {normalise(Requirement(line).name) for line in project["dependencies"]}
    extra = project["optional-dependencies"]["notebooks"]
    assert not alone & {normalise(Requirement(line).name) for line in extra}


IMPORT_ALL = """
import importlib, pathlib, sys
for absent in ("matplotlib", "ipywidgets", "IPython", "ipykernel", "jupyter_client"):
    sys.modules[absent] = None  # importing it now raises ImportError
folder = pathlib.Path("dlmlib")
chosen = [
    ".".join(path.with_suffix("").parts)
    for path in folder.rglob("*.py")
    if path.name != "__main__.py" and "show" not in path.parts
]
for module in chosen:
    importlib.import_module(module)
assert "dlmlib.show" not in sys.modules, "the library imports dlmlib.show"
print(len(chosen))
"""


def test_the_library_imports_where_jupyter_and_matplotlib_are_absent():
    command = [sys.executable, "-c", IMPORT_ALL]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 5
