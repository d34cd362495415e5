"""Diffusion language models: one network, one decoding loop, small policies.

import dlmlib as dlm
model, tokenizer = dlm.load("grammar")
out = dlm.decode(model, tokenizer("the cat")["input_ids"], length=18)
"""

from dlmlib import presets, tasks
from dlmlib.decoding import (
    Blocks,
    Confidence,
    DecodeOutput,
    DualCache,
    EarlyCommit,
    EntropyBound,
    Even,
    Everywhere,
    Factor,
    LeftToRight,
    Margin,
    NegEntropy,
    PrefixCache,
    Random,
    Remask,
    RightToLeft,
    Scheduled,
    Speculate,
    Threshold,
    Trace,
    decode,
)
from dlmlib.device import (
    Timer,
    current_scale,
    generator,
    scale,
    setup,
)
from dlmlib.diffusion import (
    NELBO,
    AutoregressiveNLL,
    exact_log_likelihood,
    log_likelihood,
    mask_tokens,
    named_schedule,
    posterior,
    unmask_tokens,
)
from dlmlib.memory import back_off, memory_plan
from dlmlib.model import DiffusionLM, DLMConfig, KVCache
from dlmlib.text import word_tokenizer
from dlmlib.training.batches import batches_from, fresh_batches
from dlmlib.training.fit import fit
from dlmlib.training.recipes import RECIPES, load

__version__ = "0.1.0"

__all__ = [
    "NELBO",
    "RECIPES",
    "AutoregressiveNLL",
    "Blocks",
    "Confidence",
    "DLMConfig",
    "DecodeOutput",
    "DiffusionLM",
    "DualCache",
    "EarlyCommit",
    "EntropyBound",
    "Even",
    "Everywhere",
    "Factor",
    "KVCache",
    "LeftToRight",
    "Margin",
    "NegEntropy",
    "PrefixCache",
    "Random",
    "Remask",
    "RightToLeft",
    "Scheduled",
    "Speculate",
    "Threshold",
    "Timer",
    "Trace",
    "back_off",
    "batches_from",
    "current_scale",
    "decode",
    "exact_log_likelihood",
    "fit",
    "fresh_batches",
    "generator",
    "load",
    "log_likelihood",
    "mask_tokens",
    "memory_plan",
    "named_schedule",
    "posterior",
    "presets",
    "scale",
    "setup",
    "tasks",
    "unmask_tokens",
    "word_tokenizer",
]
