"""One group-relative policy gradient over any estimator of the log-probability.

A run is `fit` with two parts from here: `Rollouts` draws the batches, by decoding and
grading, and `GroupRelative` is their loss.

    rollouts = Rollouts(model, prompts, rewards, method, length=7)
    fit(model, rollouts, GroupRelative(method), steps=100, lr=5e-4, weight_decay=0.0)
"""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dlmlib.decoding.decode import decode
from dlmlib.errors import check
from dlmlib.model.call import mask_token_of
from dlmlib.rl.estimators import OneState, Trajectory
from dlmlib.rl.learned_order import commit_rank
from dlmlib.rl.logprob import Views
from dlmlib.rl.lora import WithoutLora, has_lora
from dlmlib.rl.methods import ADVANTAGES, Method
from dlmlib.rl.shares import mine, of_all, own_share

Batch = dict[str, Tensor]


def advantages(
    reward: Float[Tensor, "n G"], kind: str = "group", eps: float = 1e-4
) -> Float[Tensor, "n G"]:
    """How much better each of a prompt's G completions was than its siblings.

    group: (r - mean) / (std + eps) within the group (GRPO).
    mean: r - mean (Dr. GRPO).
    leave_one_out: r - mean of the others = (r - mean) G / (G - 1) (RLOO).
    batch: (r - mean) / std of all centred rewards (Lite PPO).
    weights: softmax(A) - softmax(-A) of the group's A (wd1).

    Raises:
        ValueError: for another kind, or groups of one.
    Source: GRPO (arXiv 2402.03300); Lite PPO (arXiv 2508.08221); wd1 (2507.08838).
    Introduced in notebook 20.
    """
    check(kind in ADVANTAGES, "advantage", kind, f"one of {ADVANTAGES}")
    size = reward.shape[1]
    check(size >= 2, "group", size, "an integer >= 2")
    centred = reward - reward.mean(1, keepdim=True)
    if kind == "mean":
        return centred
    if kind == "leave_one_out":
        return centred * size / (size - 1)
    if kind == "batch":
        return centred / (centred.std() + eps)
    scaled = centred / (reward.std(1, keepdim=True) + eps)
    if kind == "weights":
        return scaled.softmax(1) - (-scaled).softmax(1)
    return scaled


class Rollouts:
    """Batches of graded completions for `fit`; each serves `epochs` updates.

    A rollout is one batched decode with a trace. Under `accelerate launch` each process
    decodes its share of the prompts. The estimator's copies are drawn once for each
    epoch; old policy and reference are evaluated on the very same copies.

    Where it knows the old policy's value beforehand it does not compute it: along the
    trajectory the decoder reported it, and in the only epoch old and new are equal.

    Args:
        model: the policy, which `fit` trains.
        prompts: generator -> prompt_ids [n, P] of one rollout; or, for prompts of
            different lengths, a tokenizer's input_ids and attention_mask, padded left.
        rewards: one grader, or several by name, whose sum counts:
            (prompt_ids [B, P], completion_ids [B, L]) -> rewards [B]. Not-a-number says
            that a completion could not be graded: it is counted and earns 0.
        method: see `Method`.
        length: L, tokens of a completion. 0 fills the masks inside the prompts: the
            completion is what follows the first of them.
        group: G, completions of a prompt.
        temperature: of the rollouts.
        reference: model that the KL penalty is taken against, if the method has one;
            None for the model as it is now: without its adapters, or a frozen copy.
    Attributes:
        log: one dict a rollout: mean reward (of each grader, and their sum), share of
            groups with equal rewards, failed gradings, forwards of the decode.
    Introduced in notebook 20.
    """

    def __init__(
        self,
        model,
        prompts: Callable[[torch.Generator], Int[Tensor, "n P"] | Batch],
        rewards: Callable | dict[str, Callable],
        method: Method,
        *,
        length: int,
        group: int = 8,
        temperature: float = 1.0,
        reference=None,
    ):
        check(group >= 2, "group", group, "an integer >= 2")
        self.model, self.prompts, self.method = model, prompts, method
        self.rewards = rewards if isinstance(rewards, dict) else {"reward": rewards}
        self.length, self.group, self.temperature = length, group, temperature
        if reference is None and method.kl > 0:
            reference = WithoutLora(model) if has_lora(model) else frozen(model)
        self.reference = reference
        self.waiting: list[Batch] = []
        self.log: list[dict[str, float]] = []

    def __call__(self, generator: torch.Generator) -> Batch:
        """The next update's batch, from a new rollout if the last one is used up."""
        if not self.waiting:
            self.waiting = self.collect(generator)
        return self.waiting.pop(0)

    @torch.no_grad()
    def collect(self, generator) -> list[Batch]:
        """Decode, grade, and draw the copies of every epoch."""
        device = next(self.model.parameters()).device
        given, generator = own_share(as_batch(self.prompts(generator)), generator)
        given = {
            n: t.to(device).repeat_interleave(self.group, 0) for n, t in given.items()
        }
        prompt, real = given["input_ids"], given.get("attention_mask")
        training = self.model.training
        self.model.eval()
        options = {"length": self.length, "temperature": self.temperature}
        options |= {"trace": True, "generator": generator, "attention_mask": real}
        options |= self.method.decode
        if self.method.draw_order is not None:
            options |= self.method.draw_order(self.model, generator)
        out = decode(self.model, prompt, **options)
        prompt, answer = self.parts(prompt, out.sequences)
        reward = self.graded(prompt, answer, out.forwards)
        advantage = mine(advantages(reward, self.method.advantage)).flatten()
        begin = prompt.shape[1]
        real = None if real is None else real[:, :begin]
        step = out.trace.commit_step[:, begin:]
        rank = None
        if self.method.draw_order is not None:
            rank = commit_rank(out.trace)[:, begin:]
        known = out.trace.commit_logprob.nan_to_num(0.0)
        drawn = [
            self.copies(prompt, answer, step, rank, advantage, known, generator, real)
            for _ in range(self.method.epochs)
        ]
        self.model.train(training)
        return [{n: of_all(t) for n, t in batch.items()} for batch in drawn]

    def parts(self, prompt, whole):
        """(prompt, completion): a completion may begin with a mask of the prompt."""
        hidden = (prompt == mask_token_of(self.model)).any(0)
        begin = int(hidden.int().argmax()) if hidden.any() else prompt.shape[1]
        expected = "an estimator along the trajectory, since some tokens are given"
        fits = begin == prompt.shape[1] or isinstance(
            self.method.estimator, Trajectory | OneState
        )
        check(fits, "method.estimator", self.method.estimator, expected)
        return whole[:, :begin], whole[:, begin:]

    def graded(self, prompt, answer, forwards: int) -> Float[Tensor, "n G"]:
        """The summed rewards; logs them."""
        marks = {
            name: of_all(grade(prompt, answer).float())
            for name, grade in self.rewards.items()
        }
        failed = torch.stack([mark.isnan() for mark in marks.values()]).any(0)
        marks = {name: mark.nan_to_num(0.0) for name, mark in marks.items()}
        total = sum(marks.values()).view(-1, self.group)
        entry = {name: mark.mean().item() for name, mark in marks.items()}
        entry["total"] = total.mean().item()
        entry["equal"] = (total == total[:, :1]).all(1).float().mean().item()
        entry |= {"failed": int(failed.sum()), "forwards": forwards}
        self.log.append(entry)
        return total

    def copies(
        self, prompt, answer, step, rank, advantage, known, generator, real=None
    ) -> Batch:
        """One epoch's batch: copies, advantage, old and reference log-probabilities."""
        method, mask = self.method, mask_token_of(self.model)
        views = method.estimator.draw(prompt, answer, mask, generator, step, real, rank)
        batch = {
            "target": views.target,
            "canvas": views.canvas,
            "weight": views.weight,
            "advantage": advantage,
        }
        if views.valid is not None:
            batch["valid"] = views.valid
        if rank is not None:
            batch["rank"] = views.rank
        estimator = method.estimator  # the order's terms are not in the trace
        exact = type(estimator) is Trajectory and not estimator.segments
        if exact and self.temperature > 0:
            batch["old"] = known  # the rollout computed them already
        elif method.clip is not None and method.epochs > 1:
            batch["old"] = method.estimator.evaluate(self.model, views).tokens
        if method.kl > 0:
            found = method.estimator.evaluate(self.reference, views)
            batch["reference"] = found.tokens
        return batch

    def state_dict(self) -> Batch:
        """Batches still to be used; part of what `fit` saves."""
        return {
            f"{number}.{name}": tensor
            for number, batch in enumerate(self.waiting)
            for name, tensor in batch.items()
        }

    def load_state_dict(self, state: Batch) -> None:
        """Continue from a `state_dict`."""
        self.waiting = []
        for key in sorted(state, key=lambda k: int(k.split(".")[0])):
            number, name = key.split(".", 1)
            while len(self.waiting) <= int(number):
                self.waiting.append({})
            self.waiting[int(number)][name] = state[key]


class GroupRelative:
    """The loss of a graded batch.

    With ratio r = exp(new - old) of each token (or of the whole completion),
    loss = - min( r A, clip(r, 1 - eps, 1 + eps) A ) + beta k3,
    k3 = exp(ref - new) - (ref - new) - 1,
    or - A log p where the method leaves the ratio out. Averaged over tokens, or over
    completions for level "sequence".

    Introduced in notebook 20.
    """

    def __init__(self, method: Method):
        self.method = method

    def corrupt(self, batch: Batch, generator=None) -> Batch:
        """The copies were drawn with the rollout; says how many terms a row has."""
        terms = (batch["weight"] != 0).any(1).sum(1)
        if self.method.level == "sequence":
            terms = torch.ones_like(terms)
        return {**batch, "tokens": terms}

    def __call__(self, model, batch: Batch) -> Float[Tensor, " B"]:
        """Loss of each row, summed over its terms."""
        method = self.method
        parts = ("target", "canvas", "weight", "valid", "rank")
        views = Views(*(batch.get(part) for part in parts))
        found = method.estimator.terms(model, views)
        new = method.estimator.combine(found, views.weight)
        gain = batch["advantage"][:, None]
        if method.negative is not None:
            lowered = method.negative.combine(found, views.weight)
            new = torch.where(gain < 0, lowered, new)
        scored = (views.weight != 0).any(1)
        old, reference = (
            batch.get(name, new.detach()) for name in ("old", "reference")
        )
        if method.level == "sequence":
            new, old, reference = (x.sum(1, True) for x in (new, old, reference))
            scored = torch.ones_like(new, dtype=torch.bool)
        loss = -surrogate(new, old, gain, method.clip)
        if method.kl > 0:
            away = reference - new
            loss = loss + method.kl * (away.exp() - away - 1)
        return loss.masked_fill(~scored, 0.0).sum(1)


def as_batch(prompts: Tensor | Batch) -> Batch:
    """Prompts as a tokenizer gives them; the mask is left out if nothing is padded."""
    if isinstance(prompts, Tensor):
        return {"input_ids": prompts}
    return {name: prompts[name] for name in ("input_ids", "attention_mask")}


def frozen(model):
    """A copy that never changes."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def surrogate(new, old, gain, clip: float | None) -> Float[Tensor, "B n"]:
    """min(r A, clip(r) A), or A log p without a ratio."""
    if clip is None:
        return gain * new
    ratio = (new - old).exp()
    return torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
