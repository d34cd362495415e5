"""How good an assistant is, how good it can be, and how far luck moves it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dlmlib.errors import check


@dataclass(frozen=True)
class Reliability:
    """Averages over instructions, in the unit of the scores.

    mean: P, the mean score.
    aptitude: A, the 90th percentile of an instruction's runs.
    unreliability: U, the 90th percentile less the 10th.
    """

    mean: float
    aptitude: float
    unreliability: float


def reliability(scores: Float[Tensor, "I R"]) -> Reliability:
    """Mean, aptitude and unreliability of repeated runs.

    With S the scores of the R runs of one instruction, and averaged over instructions,
    P = mean S, A = percentile_90 S, U = percentile_90 S - percentile_10 S. Percentiles
    interpolate linearly between runs.

    Args:
        scores: one row an instruction, one column a run; usually 0 … 100.
    Returns:
        `Reliability`.
    Raises:
        ValueError: not a table of numbers with at least one row and two columns.
    Source: Laban et al. (arXiv 2505.06120), metrics of simulated conversations.
    Introduced in notebook 16.
    """
    table = scores.ndim == 2 and scores.shape[0] >= 1 and scores.shape[1] >= 2
    check(table, "scores.shape", tuple(scores.shape), "(I >= 1, R >= 2)")
    scores = scores.double()
    check(not scores.isnan().any(), "scores", "nan", "numbers")
    low, high = scores.quantile(torch.tensor([0.1, 0.9]).to(scores), dim=1)
    return Reliability(
        mean=scores.mean().item(),
        aptitude=high.mean().item(),
        unreliability=(high - low).mean().item(),
    )
