"""Remake tests/parity/goldens from the full golden folders, byte for byte.

    python tests/parity/repack.py FOLDER

FOLDER holds a folder for each of the names below, with config.json, model.safetensors,
calls.json and golden.npz: tiny random checkpoints and what the official programs
answered. Kept are the programs below; token ids become int16, and first-forward
logits that repeat an earlier call's bit for bit are dropped.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "goldens"
PROGRAMS = {
    "llada_a": (
        "llada_logits",
        "llada_loss",
        "llada_loglik",
        "llada_generate",
        "fastdllm_llada",
        "prophet_llada",
        "d1_llada",
        "nap",
    ),
    "dream_a": (
        "dream_logits",
        "dream_generate",
        "fastdllm_dream",
        "coupled_grpo_dream",
    ),
    "lladou_llada_a": ("lladou",),
}
LOGITS = ("forward_logits_0", "shifted_logits_0")


def repack(arrays: dict[str, np.ndarray], programs: tuple[str, ...]) -> dict:
    """The arrays of these programs, narrow and without repeated logits."""
    kept, seen = {}, set()
    for key, array in arrays.items():
        if key.split("/")[0] not in programs:
            continue
        if key.endswith(LOGITS):
            call = key.rsplit("/", 1)[0]
            first = arrays[f"{call}/forward_inputs"][0].tobytes()
            padding = arrays.get(f"{call}/attention_mask", np.empty(0)).tobytes()
            content = (first, padding, array.tobytes())
            if content in seen:
                continue
            seen.add(content)
        kept[key] = array.astype(np.int16) if array.dtype == np.int64 else array
    return kept


def main(source: Path) -> None:
    for name, programs in PROGRAMS.items():
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(source / name / file, folder / file)
        calls = json.loads((source / name / "calls.json").read_text())
        calls = {program: calls[program] for program in programs}
        (folder / "calls.json").write_text(json.dumps(calls, indent=1) + "\n")
        with np.load(source / name / "golden.npz") as arrays:
            kept = repack(dict(arrays), programs)
        np.savez_compressed(folder / "golden.npz", **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
