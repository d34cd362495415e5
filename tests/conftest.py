"""Settings of every test: offline, the ci scale, reproducible examples."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DLM_SCALE", "ci")

import pytest
from hypothesis import settings

settings.register_profile("dlmlib", deadline=None, derandomize=True, database=None)
settings.load_profile("dlmlib")


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` on a machine without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a CUDA device")
            for item in marked:
                item.add_marker(skip)
