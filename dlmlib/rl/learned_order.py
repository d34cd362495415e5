"""Trajectories whose order was drawn by an `OrderHead`: their log-probability.

model.order_head = OrderHead(model.config)
method = methods.dcolt()
rollouts = Rollouts(model, prompts, rewards, method, length=7)
fit(model, rollouts, GroupRelative(method), steps=…)  # network and head together
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.trace import Trace
from dlmlib.errors import check
from dlmlib.model.call import mask_token_of, unwrapped
from dlmlib.model.lazy_logits import lazy_logits_at
from dlmlib.rl.estimators import Trajectory
from dlmlib.rl.logprob import Views
from dlmlib.rl.unmasking_policy import (
    Learned,
    OrderHead,
    answer_columns,
    plackett_luce,
    share_written,
)


class OrderedTrajectory(Trajectory):
    """Along the steps the decoder took, tokens and order: all that was drawn.

    sum_s [ log PL(positions drawn at s | h) + sum_{i drawn at s} log p(x_i | canvas) ]

    with h from `model.order_head` on the canvas before step s. A term goes to each
    token: why here, now, and why this token. A step that writes everything open has no
    choice, so its order counts nothing. The gradient reaches network and head; freeze
    either with `requires_grad_(False)`.

    Args:
        block_length: of the decoder; None for one block.
    Raises:
        ValueError: for a block below 1; when evaluated, for a model without an order
            head or a rollout whose order within a step is not known.
    Source: DCoLT (arXiv 2505.10446). Introduced in notebook 21.
    """

    def __init__(self, block_length: int | None = None):
        fits = block_length is None or block_length >= 1
        check(fits, "block_length", block_length, "None or an integer >= 1")
        super().__init__()
        self.block_length = block_length

    def terms(self, model, views: Views) -> Float[Tensor, "B K T"]:
        """Token and order term of each token where it was written, 0 elsewhere."""
        written = views.weight != 0
        asked = written.any(1)
        answer = answer_columns(asked)
        drawn = written[:, :, answer].flatten(0, 1)  # [B K, L]
        target = views.target[:, None, answer].expand_as(written[:, :, answer])
        states, logits = read(model, views, answer, drawn)
        chosen = logits.gather(1, target.flatten(0, 1)[drawn][:, None])[:, 0]
        tokens = (chosen - logits.logsumexp(1)).float()
        order = self.order(model, views, states, asked, answer, drawn)
        found = order.masked_scatter(drawn, order[drawn] + tokens)
        full = found.new_zeros(written.shape)
        full[:, :, answer] = found.view(target.shape)
        return full

    def order(self, model, views, states, asked, answer, drawn):
        """The order's terms [B K, L], from the states of the answer."""
        copies = views.canvas.shape[1]
        asked = asked[:, answer].repeat_interleave(copies, dim=0)
        canvas = views.canvas[:, :, answer].flatten(0, 1)
        masked = (canvas == mask_token_of(model)) & asked
        inside = self.inside(masked)
        h = head_of(model)(states, share_written(masked, asked), masked, inside)
        open_ = masked & inside
        rank = ranks_within(views, drawn.view(len(views.target), copies, -1), answer)
        terms = plackett_luce(h, open_, rank.flatten(0, 1).masked_fill(~drawn, -1))
        choice = (open_ & ~drawn).any(1, keepdim=True)
        return terms.masked_fill(~choice, 0.0)

    def inside(self, masked: Bool[Tensor, "N L"]) -> Bool[Tensor, "N L"]:
        """The block of the leftmost mask: the one that was being written."""
        if self.block_length is None:
            return torch.ones_like(masked)
        columns = torch.arange(masked.shape[1], device=masked.device)
        block = columns // self.block_length
        first = torch.where(masked, block, block[-1]).min(1, keepdim=True).values
        return block == first


def read(model, views: Views, answer: slice, drawn):
    """(states [B K, L, D], logits [N, V] of what was drawn), from one forward."""
    canvas = views.canvas.flatten(0, 1)
    seen = torch.zeros_like(canvas, dtype=torch.bool)
    seen[:, answer] = True
    valid = views.valid
    if valid is not None:
        valid = valid.repeat_interleave(views.canvas.shape[1], dim=0)
    lazy = lazy_logits_at(model, canvas, seen, valid)
    states = lazy.states.view(*drawn.shape, -1)
    logits = lazy.head(states[drawn])
    return states, logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_of(model) -> OrderHead:
    """The order head of a model, seen through wrappers.

    Raises:
        ValueError: if it has none.
    """
    head = getattr(unwrapped(model), "order_head", None)
    expected = "one with model.order_head = OrderHead(model.config)"
    check(head is not None, "model", type(model).__name__, expected)
    return head


def ranks_within(views: Views, drawn: Bool[Tensor, "B K L"], answer: slice):
    """Rank of each token within its step [B, K, L], known or trivial."""
    if views.rank is not None:
        return views.rank[:, None, answer].expand_as(drawn)
    alone = bool((drawn.sum(2) <= 1).all())
    check(alone, "commit_rank", None, "ranks, since a step wrote several tokens")
    return torch.zeros_like(drawn, dtype=torch.long)


def commit_rank(trace: Trace) -> Int[Tensor, "B T"]:
    """Place of each token among those of its step, the highest score first.

    With `Learned` the scores carry the noise of the draw, so this is the order in which
    the positions were drawn.

    Returns:
        0 for the first, 1 for the next, …; -1 for tokens that were given.
    Introduced in notebook 21.
    """
    step = trace.commit_step
    score = trace.score.nan_to_num(-torch.inf).gather(0, step.clamp_min(0)[None])[0]
    same = step[:, :, None] == step[:, None, :]
    tie = score[:, None, :] == score[:, :, None]
    before = (score[:, None, :] > score[:, :, None]) | tie.tril(-1)  # [B, i, j]
    return (same & before).sum(2).masked_fill(step < 0, -1)


def drawn_order(model, generator: torch.Generator | None) -> dict[str, Learned]:
    """Arguments of `decode` that draw the order from the model's head."""
    return {"propose": Learned(head_of(model), generator)}
