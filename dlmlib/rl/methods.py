"""The published policy-gradient methods as configurations of one loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dlmlib.errors import check
from dlmlib.rl.estimators import (
    ELBO,
    EUBO,
    Coupled,
    InOrder,
    MeanField,
    OneState,
    Trajectory,
)
from dlmlib.rl.learned_order import OrderedTrajectory, drawn_order
from dlmlib.rl.logprob import Estimator

ADVANTAGES = ("group", "mean", "leave_one_out", "batch", "weights")


@dataclass(frozen=True)
class Method:
    """What a policy-gradient method is made of.

    estimator: of the log-probability of a completion.
    epochs: updates on one rollout, each with copies of its own.
    clip: eps of the ratio's range [1 - eps, 1 + eps]; None leaves the ratio out, which
        is what a detached old policy amounts to.
    kl: beta of the penalty for leaving the reference.
    advantage: see `advantages`.
    level: "token" (a ratio a token) or "sequence" (a ratio a completion).
    negative: estimator for completions with a negative advantage; None for the same.
    decode: arguments of the rollouts' `decode`.
    draw_order: (model, generator) -> more of them, for an order that the model draws.

    Introduced in notebook 20.
    """

    estimator: Estimator
    epochs: int = 1
    clip: float | None = 0.2
    kl: float = 0.0
    advantage: str = "group"
    level: str = "token"
    negative: Estimator | None = None
    decode: dict[str, Any] = field(default_factory=dict)
    draw_order: Callable[..., dict[str, Any]] | None = None

    def __post_init__(self):
        check(self.epochs >= 1, "epochs", self.epochs, "an integer >= 1")
        check(self.clip is None or self.clip > 0, "clip", self.clip, "None or > 0")
        check(self.kl >= 0, "kl", self.kl, ">= 0")
        check(self.advantage in ADVANTAGES, "advantage", self.advantage, ADVANTAGES)
        check(
            self.level in ("token", "sequence"),
            "level",
            self.level,
            "token or sequence",
        )


def diffu_grpo(
    epochs: int = 4, clip: float = 0.2, kl: float = 0.04, **options
) -> Method:
    """d1: one-step mean field, another part of the prompt hidden in each epoch.

    Source: arXiv 2504.12216 (its program: 12 epochs, clip 0.5). Introduced in
    notebook 20.
    """
    own = {"epochs": epochs, "clip": clip, "kl": kl, "estimator": MeanField(0.15)}
    return Method(**own | options)


def coupled_grpo(epochs: int = 2, clip: float = 0.5, kl: float = 0.01, **options):
    """DiffuCoder: a mask and its complement; rewards are centred, not scaled.

    Source: arXiv 2506.20639. Introduced in notebook 20.
    """
    own = {"epochs": epochs, "clip": clip, "kl": kl, "estimator": Coupled()}
    return Method(**own | {"advantage": "leave_one_out"} | options)


def just_grpo(**options) -> Method:
    """Plain GRPO on the left-to-right factorisation, with left-to-right rollouts.

    Source: arXiv 2601.15165. Introduced in notebook 20.
    """
    own = {"estimator": InOrder(), "decode": {"propose": "left_to_right"}}
    return Method(**own | options)


def wd1(**options) -> Method:
    """Weights instead of ratios: softmax(A) - softmax(-A) over the group.

    Source: arXiv 2507.08838. Introduced in notebook 20.
    """
    own = {"estimator": MeanField(0.15), "clip": None, "advantage": "weights"}
    return Method(**own | options)


def spg(**options) -> Method:
    """A lower bound for what shall become likelier, an upper one for the rest.

    Source: arXiv 2510.09541. Introduced in notebook 20.
    """
    own = {"estimator": ELBO(2), "negative": EUBO(times=2), "clip": None}
    return Method(**own | {"level": "sequence", "advantage": "mean"} | options)


def trajectory(**options) -> Method:
    """The whole trajectory, every step of the rollout (DCoLT without its order head).

    Source: arXiv 2505.10446. Introduced in notebook 20.
    """
    return Method(**{"estimator": Trajectory()} | options)


def one_state(**options) -> Method:
    """One step of the trajectory, as dTRPO estimates it, in place of all.

    Source: arXiv 2603.18806, whose loss is a preference loss. Introduced in
    notebook 20.
    """
    return Method(**{"estimator": OneState()} | options)


def dcolt(steps: int | None = None, block_length: int | None = None, **options):
    """DCoLT: the whole trajectory, its order drawn and trained with the tokens.

    The model needs an order head. One update a rollout, so no ratio is taken; rewards
    are scaled by the spread within their group.

    Args:
        steps, block_length: of the rollouts' `decode`.
    Source: arXiv 2505.10446 (its program: 256 tokens in 64 steps, groups of 16).
    Introduced in notebook 21.
    """
    decode = {"steps": steps, "block_length": block_length}
    own = {"estimator": OrderedTrajectory(block_length), "draw_order": drawn_order}
    return Method(**own | {"clip": None, "decode": decode} | options)
