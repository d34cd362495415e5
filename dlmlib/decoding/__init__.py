"""One loop, small policies."""

from dlmlib.decoding.commit import EntropyBound, Even, Factor, Scheduled, Threshold
from dlmlib.decoding.decode import DecodeOutput, decode
from dlmlib.decoding.propose import (
    Confidence,
    LeftToRight,
    Margin,
    NegEntropy,
    Random,
    RightToLeft,
)
from dlmlib.decoding.reuse import DualCache, PrefixCache
from dlmlib.decoding.revise import Remask
from dlmlib.decoding.speculate import Speculate
from dlmlib.decoding.stop import EarlyCommit
from dlmlib.decoding.trace import Trace
from dlmlib.decoding.where import Blocks, Everywhere, Streams

__all__ = [
    "Blocks",
    "Confidence",
    "DecodeOutput",
    "DualCache",
    "EarlyCommit",
    "EntropyBound",
    "Even",
    "Everywhere",
    "Factor",
    "LeftToRight",
    "Margin",
    "NegEntropy",
    "PrefixCache",
    "Random",
    "Remask",
    "RightToLeft",
    "Scheduled",
    "Speculate",
    "Streams",
    "Threshold",
    "Trace",
    "decode",
]
