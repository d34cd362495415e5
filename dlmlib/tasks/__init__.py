"""Synthetic tasks: sample, render and grade."""

from dlmlib.tasks import grammar, toy

__all__ = ["grammar", "toy"]
