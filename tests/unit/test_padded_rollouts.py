"""Prompts of different lengths: padding changes nothing that is learned from."""

import pytest
import torch
from tiny import tiny_model
from toys import gen

from dlmlib.rl import methods
from dlmlib.rl.logprob import Views
from dlmlib.rl.policy_gradient import GroupRelative, Rollouts

MASK, PAD, LENGTH = 3, 0, 3
METHODS = [
    methods.diffu_grpo(epochs=2, kl=0.1),
    methods.coupled_grpo(),
    methods.trajectory(),
    methods.one_state(),
    methods.just_grpo(),
]


def model():
    return tiny_model(0, vocab_size=8, mask_token_id=MASK, pad_token_id=PAD)


def ragged(generator):
    """One prompt of four tokens and one of two."""
    ids = torch.tensor([[4, 5, 6, 7], [PAD, PAD, 6, 4]])
    return {"input_ids": ids, "attention_mask": ids != PAD}


def reward(prompt, completion):
    return (completion % 2).float().mean(1)


def rollouts(policy, prompts, method):
    return Rollouts(policy, prompts, reward, method, length=LENGTH, group=4)


@pytest.mark.parametrize("method", METHODS)
def test_padding_takes_no_part(method):
    """Other tokens under the padding, or none at all, give the same loss."""
    policy = model()
    batch = rollouts(policy, ragged, method)(gen(5))
    objective = GroupRelative(method)
    loss = objective(policy, batch)
    shaken = {**batch, "canvas": batch["canvas"].clone()}
    shaken["canvas"][4:, :, :2] = 7
    torch.testing.assert_close(objective(policy, shaken), loss)
    if method.estimator.__class__.__name__ == "MeanField":
        return  # hides tokens of the prompt, here those of the padding as well
    short = {name: part[4:] for name, part in batch.items() if name != "valid"}
    for name in ("target", "canvas", "weight", "rank", "old", "reference"):
        if name in short:
            short[name] = short[name][..., 2:]
    torch.testing.assert_close(objective(policy, short), loss[4:])


def test_what_the_decoder_reported_is_what_the_loss_computes():
    policy, method = model(), methods.trajectory()
    batch = rollouts(policy, ragged, method)(gen(5))
    parts = ("target", "canvas", "weight", "valid")
    views = Views(*(batch[part] for part in parts))
    torch.testing.assert_close(
        method.estimator.evaluate(policy, views).tokens, batch["old"]
    )


def test_equal_lengths_need_no_mask():
    policy, method = model(), methods.trajectory()

    def bare(generator):
        return torch.tensor([[4, 5], [6, 4]])

    def tokenized(generator):
        ids = bare(generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    one = rollouts(policy, bare, method)(gen(5))
    two = rollouts(policy, tokenized, method)(gen(5))
    assert "valid" not in one and bool(two.pop("valid").all())
    for name, part in one.items():
        torch.testing.assert_close(part, two[name])
