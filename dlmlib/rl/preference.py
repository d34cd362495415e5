"""Preference optimisation (DPO) over any estimator of the log-probability.

pairs = preference_pairs(prompt_ids, completion_ids, reward)  # a datasets.Dataset
scored = with_reference(pairs, reference, estimator, seed=0)
fit(policy, batches_from(scored, 32), DPO(estimator, beta=0.1), steps=…)
"""

import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor

from dlmlib.device import generator
from dlmlib.errors import check
from dlmlib.model.call import mask_token_of
from dlmlib.rl.logprob import Estimator, Views

SIDES = ("chosen", "rejected")


def preference_pairs(
    prompt_ids: Int[Tensor, "n P"],
    completion_ids: Int[Tensor, "n G L"],
    reward: Float[Tensor, "n G"],
    commit_step: Int[Tensor, "n G L"] | None = None,
) -> Dataset:
    """The best and the worst of each prompt's G completions, as a pair.

    A prompt whose completions all earned the same has no pair.

    Args:
        prompt_ids: [n, P].
        completion_ids: [n, G, L].
        reward: of each completion; the first of equals is taken.
        commit_step: the steps of the rollouts, for estimators that follow them.
    Returns:
        A dataset of prompt_ids, chosen_ids and rejected_ids, with chosen_steps and
        rejected_steps if steps are given; what `with_reference` reads.
    Raises:
        ValueError: unless reward is [n, G] of these completions, or if no prompt has
            completions of different rewards.
    Introduced in notebook 19.
    """
    fits = reward.shape == completion_ids.shape[:2]
    check(fits, "reward.shape", tuple(reward.shape), tuple(completion_ids.shape[:2]))
    reward = reward.float()
    best, worst = reward.argmax(1), reward.argmin(1)
    prompt = (reward.max(1).values > reward.min(1).values).nonzero()[:, 0]
    check(len(prompt) > 0, "reward", "all equal", "two different rewards for a prompt")
    columns = {"prompt_ids": prompt_ids[prompt]}
    for side, place in zip(SIDES, (best, worst), strict=True):
        columns[f"{side}_ids"] = completion_ids[prompt, place[prompt]]
        if commit_step is not None:
            columns[f"{side}_steps"] = commit_step[prompt, place[prompt]]
    return Dataset.from_dict({name: rows.tolist() for name, rows in columns.items()})


@torch.no_grad()
def with_reference(
    pairs: Dataset,
    reference,
    estimator: Estimator,
    *,
    draws: int = 1,
    seed: int = 0,
    shared: bool = True,
    batch_size: int = 64,
) -> Dataset:
    """Draw the estimator's copies of every pair and store the reference's value.

    The reference runs once; training only reads. Several draws give a pair as many
    rows, each with copies of its own.

    Args:
        pairs: columns prompt_ids, chosen_ids and rejected_ids, of equal lengths within
            a column; chosen_steps and rejected_steps for estimators that follow a
            trajectory; attention_mask where prompts are padded on their left.
        reference: the model that the policy is compared with.
        estimator: of log-probabilities.
        draws: rows a pair.
        seed: of the copies.
        shared: evaluate the reference on the very copies that the policy will see.
            False draws others for it, the costlier estimate that VRPO improves on.
        batch_size: pairs of a forward.
    Returns:
        A dataset that `batches_from` reads: for both sides target, canvas, weight and
        reference, the reference's log-probability in nats.
    Raises:
        ValueError: for a missing column, or fewer than one draw.
    Source: VRPO (arXiv 2505.19223), section 3. Introduced in notebook 19.
    """
    check(draws >= 1, "draws", draws, "an integer >= 1")
    wanted = ["prompt_ids", *(f"{side}_ids" for side in SIDES)]
    missing = [name for name in wanted if name not in pairs.column_names]
    check(not missing, "columns", pairs.column_names, f"{wanted} among them")
    source, mask = generator(seed), mask_token_of(reference)
    device = next(reference.parameters()).device
    table = pairs.with_format("torch")
    rows: dict[str, list[Tensor]] = {}
    for start in [s for _ in range(draws) for s in range(0, len(pairs), batch_size)]:
        batch = table[start : start + batch_size]
        for side in SIDES:
            given = batch["prompt_ids"], batch[f"{side}_ids"]
            more = batch.get(f"{side}_steps"), batch.get("attention_mask")
            views = estimator.draw(*given, mask, source, *more)
            asked = views if shared else estimator.draw(*given, mask, source, *more)
            found = estimator.evaluate(reference, moved(asked, device)).total.cpu()
            parts = {name: getattr(views, name) for name in PARTS} | {
                "reference": found
            }
            for name, part in parts.items():
                if part is not None:
                    rows.setdefault(f"{side}_{name}", []).append(part)
    columns = {name: joined(parts).tolist() for name, parts in rows.items()}
    return Dataset.from_dict({"input_ids": columns["chosen_target"], **columns})


PARTS = ("target", "canvas", "weight", "valid")  # of the copies that are stored


def joined(parts: list[Tensor]) -> Tensor:
    """Rows of all batches; where one has fewer copies than another, zeros follow.

    A weight of zero reads nothing, so that they count nothing.
    """
    if parts[0].dim() < 3:
        return torch.cat(parts)
    most = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(p, (0, 0, 0, most - p.shape[1])) for p in parts])


def moved(views: Views, device) -> Views:
    """The copies on another device."""
    parts = (getattr(views, name) for name in PARTS)
    return Views(*(None if t is None else t.to(device) for t in parts))


class DPO:
    """Direct preference optimisation: raise the chosen against the rejected answer.

    loss = -log sigmoid( beta [ (log p - log p_ref)(chosen)
                                - (log p - log p_ref)(rejected) ] )

    with both log-probabilities from one estimator. `ELBO(8)` on shared copies is VRPO,
    `OneState` is dTRPO.

    Args:
        estimator: that `with_reference` was called with.
        beta: strength of the pull towards the reference, > 0.
    Raises:
        ValueError: unless beta > 0.
    Source: DPO (arXiv 2305.18290), eq. 7; VRPO (arXiv 2505.19223); dTRPO
    (arXiv 2603.18806). Introduced in notebook 19.
    """

    def __init__(self, estimator: Estimator, beta: float = 0.1):
        check(beta > 0, "beta", beta, "> 0")
        self.estimator, self.beta = estimator, beta

    def corrupt(self, batch: dict[str, Tensor], generator=None) -> dict[str, Tensor]:
        """The copies were drawn beforehand; every pair counts once."""
        return {
            **batch,
            "tokens": torch.ones(len(batch["input_ids"]), dtype=torch.long),
        }

    def __call__(self, model, batch: dict[str, Tensor]) -> Float[Tensor, " B"]:
        """Loss of each pair."""
        return -F.logsigmoid(self.beta * self.margin(model, batch))

    def margin(self, model, batch: dict[str, Tensor]) -> Float[Tensor, " B"]:
        """Log-ratio of the chosen answer minus that of the rejected one, in nats."""
        gain = []
        for side in SIDES:
            views = Views(*(batch.get(f"{side}_{name}") for name in PARTS))
            found = self.estimator.evaluate(model, views).total
            gain.append(found - batch[f"{side}_reference"])
        return gain[0] - gain[1]
