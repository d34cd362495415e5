"""The official checkpoints and answers, loaded into `DiffusionLM`."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from dlmlib.model import DiffusionLM

GOLDENS = Path(__file__).parent / "goldens"


@dataclass
class Golden:
    """A tiny official checkpoint and what the official programs answered for it."""

    model: DiffusionLM
    arrays: dict[str, torch.Tensor]
    calls: dict[str, dict]

    @classmethod
    def load(cls, name: str) -> "Golden":
        folder = GOLDENS / name
        model = AutoModel.from_pretrained(folder)
        with np.load(folder / "golden.npz") as packed:
            arrays = {key: torch.from_numpy(packed[key]) for key in packed.files}
        ids = (torch.int16, torch.int64)
        arrays = {k: a.long() if a.dtype in ids else a for k, a in arrays.items()}
        programs = json.loads((folder / "calls.json").read_text())
        calls = {
            f"{program}/{call['name']}": call
            for program, listed in programs.items()
            for call in listed["calls"]
        }
        return cls(model.eval(), arrays, calls)

    def of(self, call: str) -> dict[str, torch.Tensor]:
        """The arrays of one call by their last name."""
        return {
            key.removeprefix(call + "/"): array
            for key, array in self.arrays.items()
            if key.startswith(call + "/")
        }


@pytest.fixture(scope="session")
def llada() -> Golden:
    return Golden.load("llada_a")


@pytest.fixture(scope="session")
def dream() -> Golden:
    return Golden.load("dream_a")
