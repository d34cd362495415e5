"""Log-probability of an answer, estimated from noised copies: the common part.

An estimator draws K copies of the row, each with other tokens hidden, and says with
what weight each hidden token's log-probability counts:

    log p(answer | prompt)  ~  sum_k sum_i weight[k, i] log p(x_i | copy k)

Drawing and evaluating are two calls, so that policy, old policy and reference can be
evaluated on the same copies, which is what makes their difference precise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.device import uniform
from dlmlib.errors import check
from dlmlib.model.call import logits_at, mask_token_of


@dataclass
class Views:
    """Noised copies of each row, and what is read from them.

    Fields:
        target: the true tokens [B, T].
        canvas: the copies [B, K, T].
        weight: of each token's log-probability [B, K, T], 0 where it is not read.
        valid: [B, T], False on padding; None if there is none.
        rank: [B, T], place of a token among those drawn at the same step, for
            estimators that score the order; None if it is not known.
    """

    target: Int[Tensor, "B T"]
    canvas: Int[Tensor, "B K T"]
    weight: Float[Tensor, "B K T"]
    valid: Bool[Tensor, "B T"] | None = None
    rank: Int[Tensor, "B T"] | None = None


@dataclass
class LogProb:
    """An estimate of log p(answer | prompt).

    Fields:
        total: [B] nats.
        tokens: the terms it is the sum of [B, T], 0 on the prompt.
        forwards: rows of the network that each answer cost, K.
    """

    total: Float[Tensor, " B"]
    tokens: Float[Tensor, "B T"]
    forwards: int


class Estimator:
    """Base of all estimators: subclasses say how the copies are drawn.

    Calling one draws and evaluates:
    `estimator(model, prompt_ids, completion_ids, generator)` -> `LogProb`.
    """

    def __call__(
        self,
        model,
        prompt_ids: Int[Tensor, "B P"],
        completion_ids: Int[Tensor, "B L"],
        generator: torch.Generator | None = None,
        commit_step: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        commit_rank: Int[Tensor, "B L"] | None = None,
    ) -> LogProb:
        """Estimate log p(completion | prompt) of each row.

        Args:
            model: maps input_ids to `.logits`; its config names the mask token.
            prompt_ids: given tokens, never scored.
            completion_ids: scored tokens.
            generator: source of the copies.
            commit_step: the step at which each token was written, for estimators that
                follow the trajectory (`Trace.commit_step`).
            attention_mask: [B, P], 0 on padding left of the prompt.
            commit_rank: the token's place within its step, for estimators that score
                the order (`commit_rank(trace)` of `dlmlib.rl.learned_order`).
        """
        mask = mask_token_of(model)
        given = commit_step, attention_mask, commit_rank
        views = self.draw(prompt_ids, completion_ids, mask, generator, *given)
        return self.evaluate(model, views)

    def draw(
        self,
        prompt_ids,
        completion_ids,
        mask_token_id: int,
        generator=None,
        commit_step=None,
        attention_mask=None,
        commit_rank=None,
    ) -> Views:
        """Draw the copies; the same ones serve any number of models."""
        check(completion_ids.shape[1] >= 1, "completion_ids", "empty", "L >= 1 tokens")
        hidden, weight, shown = self.plan(completion_ids, generator, commit_step)
        target = torch.cat([prompt_ids, completion_ids], dim=1)
        copies = hidden.shape[1]
        answer = completion_ids[:, None].expand(hidden.shape)
        answer = answer.masked_fill(hidden, mask_token_id)
        prompt = prompt_ids[:, None].expand(-1, copies, -1)
        if shown < 1:
            draw = uniform(prompt.shape, generator, prompt.device)
            prompt = prompt.masked_fill(draw >= shown, mask_token_id)
        weight = torch.cat([weight.new_zeros(prompt.shape), weight], dim=2)
        valid = None
        if attention_mask is not None:
            real = torch.ones_like(completion_ids, dtype=torch.bool)
            valid = torch.cat([attention_mask.bool(), real], dim=1)
        rank = commit_rank
        if rank is not None:
            rank = torch.cat([torch.full_like(prompt_ids, -1), rank], dim=1)
        return Views(target, torch.cat([prompt, answer], dim=2), weight, valid, rank)

    def plan(self, completion_ids, generator, commit_step):
        """(hidden [B, K, L] bool, weight [B, K, L], share of the prompt shown)."""
        raise NotImplementedError

    def evaluate(self, model, views: Views) -> LogProb:
        """The estimate of one model on given copies; differentiable."""
        tokens = self.combine(self.terms(model, views), views.weight)
        return LogProb(tokens.sum(1), tokens, views.canvas.shape[1])

    def terms(self, model, views: Views) -> Float[Tensor, "B K T"]:
        """What each copy says of each token that is read from it, 0 elsewhere."""
        return token_log_probs(model, views)

    def combine(self, logprob, weight) -> Float[Tensor, "B T"]:
        """Terms of the estimate from those of the copies [B, K, T]: a weighted sum."""
        return (weight * logprob).sum(1)


def token_log_probs(model, views: Views) -> Float[Tensor, "B K T"]:
    """log p(x_i | copy k) where it is read, 0 elsewhere; one forward of B K rows."""
    read = views.weight != 0
    canvas, where = views.canvas.flatten(0, 1), read.flatten(0, 1)
    valid = views.valid
    if valid is not None:
        valid = valid.repeat_interleave(read.shape[1], dim=0)
    logits = logits_at(model, canvas, where, valid)  # [N, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = views.target[:, None].expand_as(views.canvas)[read]
    chosen = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)
    return chosen.new_zeros(read.shape).masked_scatter(read, chosen)
