"""Policy gradients as part of a recipe: the rollouts and the loss that `fit` takes."""

import torch

from dlmlib.device import generator
from dlmlib.errors import check
from dlmlib.rl import methods
from dlmlib.rl.policy_gradient import GroupRelative, Rollouts


def policy_gradient(
    model, task, method: str, prompts: int = 16, group: int = 8, **options
) -> tuple[Rollouts, GroupRelative]:
    """What `fit` needs to improve a model on a task by a published method.

    The reward is the share of the answer's graded parts that are right.

    Args:
        model: the policy.
        task: its `batch(n, generator)` gives solved rows, whose prompts are used, and
            `grade(ids)` says of whole rows [n, T] what is right, [n] or [n, parts].
        method: a function of `dlmlib.rl.methods`, by name.
        prompts, group: problems in a rollout, and completions of each.
        options: of the method.
    Raises:
        AttributeError: for an unknown method.
        ValueError: for a task whose answers are not the last columns of its rows.
    Introduced in notebook 20.
    """
    chosen = getattr(methods, method)(**options)
    row = task.batch(1, generator(0))["maskable"][0]
    length = int(row.sum())
    check(bool(row[-length:].all()), "maskable", row, "the columns behind the prompt")

    def draw(source):
        return task.batch(prompts, source)["input_ids"][:, :-length]

    def reward(prompt, completion):
        right = task.grade(torch.cat([prompt, completion], dim=1))
        return right.float().view(len(prompt), -1).mean(1)

    rollouts = Rollouts(model, draw, reward, chosen, length=length, group=group)
    return rollouts, GroupRelative(chosen)
