"""The forward process, the objective and the likelihood."""

from dlmlib.diffusion.likelihood import exact_log_likelihood, log_likelihood
from dlmlib.diffusion.masking import (
    Schedule,
    mask_tokens,
    named_schedule,
    posterior,
    unmask_tokens,
)
from dlmlib.diffusion.objective import NELBO, AutoregressiveNLL

__all__ = [
    "NELBO",
    "AutoregressiveNLL",
    "Schedule",
    "exact_log_likelihood",
    "log_likelihood",
    "mask_tokens",
    "named_schedule",
    "posterior",
    "unmask_tokens",
]
