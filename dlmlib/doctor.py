"""`python -m dlmlib.doctor`: what works here, and what to do about the rest.

Prints one line a check, [OK] or [FAIL] with a remedy; exits with 1 if one failed.
Imports happen inside the checks, so that a broken package is a finding.
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version

GB = 10**9
DISK = 1 * GB  # executed copies, checkpoints and logs of a run of the series
MEMORY = 2 * GB  # the largest notebook at laptop scale, with JupyterLab
REINSTALL = "set the environment up again: `make venv`"


@dataclass(frozen=True)
class Result:
    """The outcome of one check."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'[OK]  ' if self.ok else '[FAIL]'} {self.name}: {self.detail}"
        return line if self.ok else f"{line}\n       -> {self.remedy}"


@dataclass(frozen=True)
class Check:
    """A probe that says what it found, or raises; then the remedy applies."""

    name: str
    probe: Callable[[], str]
    remedy: str

    def __call__(self) -> Result:
        """Run the probe; whatever it raises becomes a failed Result."""
        try:
            return Result(self.name, True, self.probe())
        except Exception as error:
            detail = str(error) or type(error).__name__
            return Result(self.name, False, detail, self.remedy)


def need(condition: bool, message: str) -> None:
    """Fail the probe with `message` unless `condition` holds."""
    if not condition:
        raise RuntimeError(message)


# ---- probes


def python() -> str:
    """The running Python is one that the package accepts."""
    from packaging.specifiers import SpecifierSet

    accepted, found = metadata("dlmlib")["Requires-Python"], platform.python_version()
    need(SpecifierSet(accepted).contains(found, True), f"{found}, needs {accepted}")
    return f"{found} at {sys.executable}"


def requirements(extra: str = "") -> dict:
    """Package -> accepted versions, of the library alone or of one extra."""
    from packaging.requirements import Requirement

    found = [Requirement(line) for line in requires("dlmlib") or []]
    if extra:
        found = [r for r in found if r.marker and r.marker.evaluate({"extra": extra})]
    else:
        found = [r for r in found if not r.marker]
    return {r.name: r.specifier for r in found}


def package(name: str) -> str:
    """The package has an accepted version and can be imported."""
    accepted, found = requirements()[name], version(name)
    message = f"{found} is installed, needs {accepted}"
    need(accepted.contains(found, prereleases=True), message)
    import_module(name)
    return f"{found} (needs {accepted})" if accepted else found


def device() -> str:
    """A small product on the chosen device, in its dtype, is right."""
    import torch

    from dlmlib.device import pick_device

    choice = pick_device()
    ones = torch.ones(64, 64, device=choice.device, dtype=choice.dtype)
    need(bool((ones @ ones == 64).all()), f"{choice.device} multiplies wrongly")
    return f"{choice.device}, {choice.reason}; a matrix product is right"


def bfloat16() -> str:
    """Whether the device computes in bfloat16; float32 does where it does not."""
    import torch

    from dlmlib.device import pick_device

    choice = pick_device()
    ones = torch.ones(64, 64, device=choice.device, dtype=torch.bfloat16)
    try:
        works = bool((ones @ ones == 64).all())
    except RuntimeError:
        works = False
    need(works or choice.dtype != torch.bfloat16, "chosen, but it does not work")
    chosen = str(choice.dtype).removeprefix("torch.")
    return f"{'works' if works else 'does not work'}; {chosen} is used"


def scale() -> str:
    """DLM_SCALE is one of the three scales."""
    from dlmlib.device import current_scale

    return current_scale()


def disk() -> str:
    """There is room for the outputs of a run."""
    free = shutil.disk_usage(".").free
    need(free >= DISK, f"{free / GB:.1f} GB free, needs {DISK / GB:.0f} GB")
    return f"{free / GB:.1f} GB free"


def memory() -> str:
    """There is memory for the notebooks."""
    from dlmlib.gauges import host_memory

    free = host_memory()
    need(free >= MEMORY, f"{free / GB:.1f} GB free, needs {MEMORY / GB:.0f} GB")
    return f"{free / GB:.1f} GB free"


def jupyter() -> str:
    """Whether the notebooks can run; the library alone does not need this."""
    missing = []
    for name in requirements("notebooks"):
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        hint = "the library works; for the notebooks `make venv`"
        return f"{', '.join(missing)} not installed: {hint}"
    return "installed"


def network() -> str:
    """Whether Hugging Face may be asked for files."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "offline (HF_HUB_OFFLINE): nothing is downloaded"
    return "downloads allowed; only DLM_SCALE=full makes any"


def checkpoints() -> str:
    """Every recipe has an intact checkpoint that this very recipe made."""
    from dlmlib.training.checkpoints import load_tensors
    from dlmlib.training.recipes import RECIPES, find_checkpoint

    paths = {name: find_checkpoint(recipe) for name, recipe in RECIPES.items()}
    missing = [name for name, path in paths.items() if path is None]
    need(not missing, f"none made by the recipe as it is now: {', '.join(missing)}")
    for path in paths.values():
        load_tensors(path)
    return f"{len(paths)} as their recipes made them"


def smoke_test() -> str:
    """A tiny random model decodes 8 tokens and leaves no mask."""
    import torch

    from dlmlib.decoding import decode
    from dlmlib.device import pick_device
    from dlmlib.gauges import Timer
    from dlmlib.model import DiffusionLM, DLMConfig

    torch_device = pick_device().device
    config = DLMConfig(vocab_size=16, mask_token_id=1)
    model = DiffusionLM(config).to(torch_device).eval()
    prompt = torch.tensor([[3, 4]], device=torch_device)
    with Timer(torch_device) as timer:
        out = decode(model, prompt, length=8, steps=4).sequences
    need(out.shape == (1, 10), f"decoded shape {tuple(out.shape)}, expected (1, 10)")
    need(not (out == 1).any(), "a mask was left")
    return f"8 tokens in 4 steps, {timer.seconds:.2f} s"


CHECKS = [
    Check("python", python, "install a Python that fits; then `make venv`"),
    *(
        Check(name, partial(package, name), REINSTALL)
        for name in ("torch", "transformers", "accelerate", "datasets", "safetensors")
    ),
    Check("device", device, "unset DLM_DEVICE, or use the CPU: DLM_DEVICE=cpu"),
    Check("bfloat16", bfloat16, "use the CPU: DLM_DEVICE=cpu"),
    Check("scale", scale, "unset DLM_SCALE, or set it to ci, laptop or full"),
    Check("disk", disk, "free some space, or run from another disk"),
    Check("memory", memory, "close other programs and kernels"),
    Check("jupyter", jupyter, REINSTALL),
    Check("downloads", network, "set HF_HUB_OFFLINE=1"),
    Check("checkpoints", checkpoints, "train them: `make checkpoints`"),
    Check("smoke test", smoke_test, REINSTALL),
]


def main(checks: Sequence[Check] = CHECKS) -> int:
    """Run the checks, print a line each and a summary.

    Returns:
        0 if all are well, 1 otherwise: the exit code of `python -m dlmlib.doctor`.

    Introduced in notebook 00.
    """
    start, failed = time.perf_counter(), 0
    for check in checks:
        result = check()
        failed += not result.ok
        print(result, flush=True)
    seconds = time.perf_counter() - start
    verdict = f"{failed} of {len(checks)} failed" if failed else "all well"
    print(f"{verdict} ({seconds:.1f} s)")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
