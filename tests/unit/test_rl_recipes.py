"""A recipe's policy gradient: prompts, reward and method come from its arguments."""

import pytest
import torch
from tiny import tiny_model
from toys import gen

from dlmlib.rl.recipes import policy_gradient
from dlmlib.tasks.arithmetic import Arithmetic
from dlmlib.training.fit import fit

TASK = Arithmetic(operations=3, operators="+")


def model():
    tokenizer = TASK.tokenizer
    return tiny_model(
        0, vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id
    )


def test_completions_of_training_problems_are_graded_and_learned_from():
    policy = model()
    rollouts, objective = policy_gradient(
        policy, TASK, "trajectory", prompts=2, group=4, clip=0.3
    )
    assert rollouts.method.clip == objective.method.clip == 0.3
    batch = rollouts(gen(0))
    rows = batch["target"]
    assert rows.shape == (8, TASK.length)
    problems = TASK.problems(rows)
    assert (problems[:4] == problems[0]).all() and not TASK.held_out(problems).any()
    right = TASK.grade(rows).float().mean().item()
    assert rollouts.log[-1]["reward"] == pytest.approx(right)
    before = policy.lm_head.weight.detach().clone()
    fit(policy, rollouts, objective, steps=3, lr=1e-2, progress=False)
    assert not torch.equal(before, policy.lm_head.weight)


def test_answers_have_to_be_the_last_columns():
    class Inside:
        def batch(self, n, generator):
            ids = torch.ones(n, 4, dtype=torch.long)
            return {"input_ids": ids, "maskable": (ids * torch.arange(4)) == 1}

    with pytest.raises(ValueError, match=r"maskable=.*behind the prompt"):
        policy_gradient(model(), Inside(), "trajectory")
    with pytest.raises(AttributeError, match="nobody"):
        policy_gradient(model(), TASK, "nobody")
