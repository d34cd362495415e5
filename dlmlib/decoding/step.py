"""One step of the loop: how many tokens, which ones, and what is taken back."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlmlib.decoding import propose as proposing
from dlmlib.decoding.canvas import Canvas
from dlmlib.decoding.commit import Commit
from dlmlib.decoding.reuse import Forward
from dlmlib.decoding.revise import Remask
from dlmlib.decoding.stop import EarlyCommit
from dlmlib.decoding.where import Blocks, Everywhere
from dlmlib.errors import check


@dataclass
class Policies:
    """The answers of one decoder to the loop's questions."""

    where: Everywhere | Blocks
    propose: proposing.Propose
    commit: Commit
    revise: Remask | None
    stop: EarlyCommit | None
    temperature: float
    generator: torch.Generator | None
    suppress: Int[Tensor, " n"] | None


def budget(
    policies: Policies, canvas: Canvas, open_: Bool[Tensor, "B T"]
) -> tuple[Int[Tensor, " B"], Bool[Tensor, "B T"]]:
    """How many tokens each row writes at this step, and which it takes back.

    As many are written in addition as are taken back. Moves the rows' clocks on.
    """
    commit, count, steps = policies.commit, open_.sum(1), None
    if commit.steps is not None:
        steps = policies.where.steps_in_phase(commit.steps, canvas)
    back, held = take_back(policies, canvas, steps)
    quota = commit.quota(count, canvas, steps, policies.generator)
    quota = (quota.masked_fill(held, 0) + back.sum(1)).minimum(count)
    canvas.phase_step += (count > 0) & ~held
    canvas.held += held
    canvas.steps_taken += count > 0
    return quota, back


def step(
    policies: Policies, forward: Forward, canvas: Canvas, rows, open_, quota, back
):
    """One forward of the active rows: what to write where, and what to take back.

    A row whose answer is settled writes all its masks and takes nothing back.
    """
    stop, watched = policies.stop, open_
    if stop is not None:
        watched = open_ | stop.watches(canvas)[rows]
    read = policies.propose.reads(canvas, rows)
    seen = watched if read is None else watched | read
    logits = forward(rows, seen, open_)
    order = None
    if read is not None:
        region = policies.where.region(canvas)[rows]
        order = policies.propose.order(logits[read[seen]], canvas, rows, region)
        logits = logits[watched[seen]]
    if stop is not None:
        total = policies.commit.steps or stop.steps
        settled = stop(canvas, rows, watched, logits, total)[:, None]
    proposal = proposing.proposals(
        policies.propose,
        logits,
        watched.nonzero()[:, 1],
        canvas.mask_token_id,
        policies.temperature,
        policies.commit.needs_entropy,
        policies.generator,
        policies.suppress,
    ).spread(watched)
    if order is not None:
        score = order.double().masked_fill(~watched, -torch.inf)
        proposal = replace(proposal, score=score)
    within = proposal if stop is None else proposal.within(open_)
    ranked = replace(within, score=policies.where.rank(within.score, open_))
    keep = policies.commit(ranked, open_, quota)
    if stop is None:
        return proposal, keep, back
    keep = torch.where(settled, canvas.masked[rows], keep)
    return proposal, keep, back & ~settled


def take_back(
    policies: Policies, canvas: Canvas, steps: Int[Tensor, " B"] | None
) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, " B"]]:
    """Positions to mask again, and rows whose schedule stands still; none by default.

    Only tokens written in the row's current phase can be taken back.
    """
    revise = policies.revise
    if revise is None:
        return torch.zeros_like(canvas.fixed), torch.zeros_like(canvas.phase).bool()
    if steps is None:
        steps = torch.full_like(canvas.phase, revise.steps)
    region = policies.where.region(canvas)
    written = region & ~canvas.fixed & ~canvas.masked
    return revise(canvas, written, steps, policies.generator)


def check_budget(policies: Policies, canvas: Canvas) -> None:
    """Every block needs a step; revising and stopping need to know their number."""
    steps, phases = policies.commit.steps, policies.where.phases(canvas)
    if steps is not None:
        check(steps >= phases, "steps", steps, f">= {phases}, one a block")
        return
    for name in ("revise", "stop"):
        policy = getattr(policies, name)
        own = None if policy is None else policy.steps
        expected = "an integer >= 1 with an adaptive commit"
        check(policy is None or own is not None, f"{name}.steps", own, expected)
