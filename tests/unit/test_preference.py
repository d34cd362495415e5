"""Preference optimisation: closed forms, shared noise, and what is stored."""

import pytest
import torch
from datasets import Dataset
from tiny import random_ids, tiny_model
from torch.nn.utils import parameters_to_vector

from dlmlib.device import generator
from dlmlib.rl.estimators import ELBO, InOrder, MeanField, OneState, Trajectory
from dlmlib.rl.preference import DPO, preference_pairs, with_reference
from dlmlib.training.batches import batches_from
from dlmlib.training.fit import fit

PAIRS, PROMPT, LENGTH = 24, 3, 4


def model_of(seed: int = 0):
    return tiny_model(seed, hidden_size=16, num_hidden_layers=1, initializer_range=0.5)


def pairs(**extra) -> Dataset:
    columns = {
        "prompt_ids": random_ids(PAIRS, PROMPT, seed=1).tolist(),
        "chosen_ids": random_ids(PAIRS, LENGTH, seed=2).tolist(),
        "rejected_ids": random_ids(PAIRS, LENGTH, seed=3).tolist(),
        "text": ["a pair"] * PAIRS,
    }
    return Dataset.from_dict({**columns, **extra})


def steps_of(seed: int):
    rows = torch.rand(PAIRS, LENGTH, generator=generator(seed)).argsort(1)
    return rows.tolist()


ONE = torch.zeros(1, 1, dtype=torch.long)
STEPS = {"chosen_steps": steps_of(1), "rejected_steps": steps_of(2)}


def batch_of(scored):
    return batches_from(scored, len(scored))(generator(0))


def test_pairs_are_the_best_and_the_worst():
    """The prompt whose rewards are equal has none; steps travel with their tokens."""
    prompt = torch.tensor([[1], [2], [3]])
    answer = torch.arange(18).view(3, 3, 2)
    reward = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.5, 0.5, -1.0]])
    found = preference_pairs(prompt, answer, reward, commit_step=answer + 100)
    assert found.to_dict() == {
        "prompt_ids": [[1], [3]],
        "chosen_ids": [[2, 3], [12, 13]],
        "chosen_steps": [[102, 103], [112, 113]],
        "rejected_ids": [[0, 1], [16, 17]],
        "rejected_steps": [[100, 101], [116, 117]],
    }
    assert "chosen_steps" not in preference_pairs(prompt, answer, reward).column_names


@pytest.mark.parametrize("estimator", [ELBO(4), MeanField(), InOrder(), OneState()])
def test_the_reference_itself_has_no_margin(estimator):
    """On shared copies exactly, so the loss is log 2 whatever the noise."""
    model = model_of()
    batch = batch_of(with_reference(pairs(**STEPS), model, estimator, draws=2))
    objective = DPO(estimator)
    with torch.no_grad():
        margin, loss = objective.margin(model, batch), objective(model, batch)
    torch.testing.assert_close(margin, torch.zeros(2 * PAIRS), rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, torch.full_like(loss, 2).log(), rtol=0, atol=1e-4)


def test_gradient_is_the_closed_form():
    """-beta sigmoid(-beta m) (grad log p(chosen) - grad log p(rejected))."""
    policy, reference, estimator, beta = model_of(1), model_of(2), InOrder(), 0.3
    batch = batch_of(with_reference(pairs(), reference, estimator))
    objective = DPO(estimator, beta)
    objective(policy, batch).sum().backward()
    found = parameters_to_vector([p.grad for p in policy.parameters()])
    policy.zero_grad()
    sides = []
    for side in ("chosen", "rejected"):
        target = batch[f"{side}_target"]
        ids = target[:, :PROMPT], target[:, PROMPT:]
        sides.append(estimator(policy, *ids).total)
        sides[-1] = sides[-1], estimator(reference, *ids).total.detach()
    (chosen, chosen_ref), (rejected, rejected_ref) = sides
    margin = (chosen - chosen_ref - rejected + rejected_ref).detach()
    weight = beta * torch.sigmoid(-beta * margin)
    (-(weight * (chosen - rejected)).sum()).backward()
    expected = parameters_to_vector([p.grad for p in policy.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_shared_copies_lower_the_variance_of_the_margin():
    """Policy near reference: noise that both see cancels."""
    reference, policy = model_of(), model_of()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    variance = {}
    for shared in (True, False):
        scored = with_reference(
            pairs(), reference, ELBO(1), draws=40, shared=shared, seed=4
        )
        table = scored.with_format("torch")[: len(scored)]
        with torch.no_grad():
            margin = DPO(ELBO(1)).margin(policy, dict(table))
        variance[shared] = margin.view(40, PAIRS).var(0).mean()
    assert variance[True] < 0.1 * variance[False]


@pytest.mark.parametrize("estimator", [ELBO(2), OneState()])
def test_training_prefers_the_chosen(estimator):
    reference, policy = model_of(), model_of()
    scored = with_reference(pairs(**STEPS), reference, estimator, draws=8)
    fit(
        policy,
        batches_from(scored, 32),
        DPO(estimator, 0.5),
        steps=60,
        lr=5e-3,
        warmup=0,
        progress=False,
    )
    fresh = batch_of(with_reference(pairs(**STEPS), reference, ELBO(8), seed=9))
    with torch.no_grad():
        margin = DPO(ELBO(8)).margin(policy, fresh)
    assert (margin > 0).float().mean() > 0.9


def test_trajectories_of_other_lengths_join():
    """Pairs written in one to four steps: each has the margin it has alone."""
    model, policy = model_of(), model_of(1)
    steps = [[min(i, row % LENGTH) for i in range(LENGTH)] for row in range(PAIRS)]
    table = pairs(chosen_steps=steps, rejected_steps=steps)
    objective = DPO(Trajectory())
    together = with_reference(table, model, Trajectory(), batch_size=3)
    found = objective.margin(policy, together.with_format("torch")[:])
    for row in range(4):
        alone = with_reference(table.select([row]), model, Trajectory())
        copies = alone.with_format("torch")[:]["chosen_canvas"].shape[1]
        assert copies == row % LENGTH + 1
        margin = objective.margin(policy, alone.with_format("torch")[:])
        torch.testing.assert_close(found[row], margin[0], rtol=1e-4, atol=1e-5)


def test_padding_of_prompts_takes_no_part():
    """Padded by two columns that count nothing, every pair has the same margin."""
    model, policy, plain = model_of(), model_of(1), pairs()
    padded = plain.map(
        lambda row: {
            "prompt_ids": [0, 0, *row["prompt_ids"]],
            "attention_mask": [0, 0] + [1] * PROMPT,
        }
    )
    objective = DPO(InOrder())
    one, two = (
        batch_of(with_reference(data, model, InOrder())) for data in (plain, padded)
    )
    assert "chosen_valid" in two and "chosen_valid" not in one
    margin = objective.margin(policy, one)
    assert margin.abs().min() > 1e-3
    torch.testing.assert_close(objective.margin(policy, two), margin)
    unaware = batch_of(
        with_reference(padded.remove_columns("attention_mask"), model, InOrder())
    )
    assert (objective.margin(policy, unaware) - margin).abs().max() > 1e-2


def test_same_seed_same_data_and_draws_differ():
    model = model_of()
    first, again = (with_reference(pairs(), model, ELBO(1), draws=2) for _ in "ab")
    assert first.to_dict() == again.to_dict()
    canvas = torch.tensor(first["chosen_canvas"])
    assert not torch.equal(canvas[:PAIRS], canvas[PAIRS:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DPO(ELBO(1), beta=0.0), "beta=0.0"),
        (lambda: with_reference(pairs(), model_of(), ELBO(1), draws=0), "draws=0"),
        (
            lambda: with_reference(
                pairs().remove_columns("chosen_ids"), model_of(), ELBO(1)
            ),
            "chosen_ids",
        ),
        (lambda: with_reference(pairs(), model_of(), OneState()), "commit_step"),
        (lambda: preference_pairs(ONE, ONE[None], torch.zeros(2, 1)), "reward.shape"),
        (lambda: preference_pairs(ONE, ONE[None], torch.zeros(1, 1)), "all equal"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
