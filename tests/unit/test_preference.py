"""Preference optimisation: closed forms, shared noise, and what is stored."""

import pytest
import torch
from datasets import Dataset
from tiny import random_ids, tiny_model
from torch.nn.utils import parameters_to_vector

from dlmlib.device import generator
from dlmlib.rl.estimators import ELBO, InOrder, MeanField, OneState
from dlmlib.rl.preference import DPO, with_reference
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


STEPS = {"chosen_steps": steps_of(1), "rejected_steps": steps_of(2)}


def batch_of(scored):
    return batches_from(scored, len(scored))(generator(0))


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
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
