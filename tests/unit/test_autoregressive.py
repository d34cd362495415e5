"""The autoregressive baseline: the chain rule, exactly."""

from itertools import product

import torch
from tiny import random_ids, tiny_model

import dlmlib as dlm
from dlmlib.training.recipes import Recipe, objective_of

CAUSAL = {"attention": "causal", "shift_logits": True}


def nats(model, ids, **batch):
    objective = dlm.AutoregressiveNLL()
    with torch.no_grad():
        return objective(model, objective.corrupt({"input_ids": ids, **batch}))


def test_probabilities_of_all_continuations_sum_to_one():
    """A sum over the data space: only a causal factorisation without leaks has it."""
    model = tiny_model(**CAUSAL, vocab_size=4, mask_token_id=3)
    rows = torch.tensor(list(product(range(4), repeat=3)))
    ids = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], dim=1)
    total = (-nats(model, ids).double()).exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)


def test_it_is_the_sum_of_one_step_conditionals():
    model, ids = tiny_model(**CAUSAL), random_ids(3, 6)
    expected = torch.zeros(3)
    for column in range(1, 6):
        prefix = ids[:, :column]
        padded = torch.cat([prefix, torch.full((3, 1), 12)], dim=1)
        with torch.no_grad():
            step = model(padded).logits[:, column].log_softmax(-1)
        expected -= step.gather(1, ids[:, column, None])[:, 0]
    torch.testing.assert_close(nats(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_given_tokens_and_padding_are_not_scored():
    model, ids = tiny_model(**CAUSAL), random_ids(2, 6)
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, :3] = False
    whole, prompt = nats(model, ids), nats(model, ids[:, :3])
    torch.testing.assert_close(nats(model, ids, maskable=maskable), whole - prompt)
    scored = dlm.AutoregressiveNLL().corrupt({"input_ids": ids, "maskable": maskable})
    assert scored["tokens"].tolist() == [3, 3]
    padding = torch.ones_like(ids)
    padding[:, 4:] = 0
    torch.testing.assert_close(
        nats(model, ids, attention_mask=padding), nats(model, ids[:, :4])
    )


def test_a_recipe_without_noise_arguments_is_autoregressive():
    recipe = Recipe("x", "", "dlmlib.tasks.grammar:Grammar", objective=None)
    assert isinstance(objective_of(recipe, None), dlm.AutoregressiveNLL)
