"""Synthetic tasks: sample, render and grade. Each file is imported by its name."""

from dlmlib.tasks import grammar, toy

__all__ = ["grammar", "toy"]
