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
    Streams,
    Threshold,
    Trace,
    decode,
)
from dlmlib.device import current_scale, generator, scale, setup
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
from dlmlib.diffusion.reweighting import CART
from dlmlib.gauges import Timer
from dlmlib.measure.arness import arness, local_arness
from dlmlib.measure.parallelism import aup
from dlmlib.measure.sequential_dependence import sequential_dependence
from dlmlib.measure.votes import any_of_k, majority
from dlmlib.memory import back_off, memory_plan
from dlmlib.model import DiffusionLM, DLMConfig, KVCache
from dlmlib.model.adapt import to_diffusion
from dlmlib.rl.unmasking_policy import Learned
from dlmlib.text import word_tokenizer
from dlmlib.training.batches import batches_from, fresh_batches
from dlmlib.training.fit import fit
from dlmlib.training.recipes import RECIPES, load

__version__ = "0.1.0"

__all__ = [
    "CART",
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
    "Learned",
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
    "Timer",
    "Trace",
    "any_of_k",
    "arness",
    "aup",
    "back_off",
    "batches_from",
    "current_scale",
    "decode",
    "exact_log_likelihood",
    "fit",
    "fresh_batches",
    "generator",
    "load",
    "local_arness",
    "log_likelihood",
    "majority",
    "mask_tokens",
    "memory_plan",
    "named_schedule",
    "posterior",
    "presets",
    "scale",
    "sequential_dependence",
    "setup",
    "tasks",
    "to_diffusion",
    "unmask_tokens",
    "word_tokenizer",
]
