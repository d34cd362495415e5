"""The policy-gradient loop: exact gradients on a world that can be enumerated."""

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.nn.utils import parameters_to_vector
from toys import StopsAfter, gen, strings
from transformers.utils import ModelOutput

from dlmlib.rl import methods
from dlmlib.rl.estimators import InOrder, MeanField, Trajectory
from dlmlib.rl.logprob import Views
from dlmlib.rl.methods import Method
from dlmlib.rl.policy_gradient import GroupRelative, Rollouts, advantages, surrogate
from dlmlib.training.fit import fit

LENGTH, LETTERS, MASK = 2, 3, 3
PLAIN = {"clip": None, "advantage": "leave_one_out"}
CONFIGURATIONS = [
    methods.diffu_grpo(),
    methods.coupled_grpo(),
    methods.just_grpo(),
    methods.wd1(),
    methods.spg(),
    methods.trajectory(),
    methods.one_state(),
    methods.trajectory(advantage="batch", level="sequence", kl=0.1),
]


class Policy(nn.Module):
    """A small network over three letters that never predicts the mask."""

    mask_token_id = MASK

    def __init__(self, seed: int):
        super().__init__()
        self.body = tiny_model(
            seed,
            vocab_size=LETTERS + 1,
            mask_token_id=MASK,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )

    def forward(self, input_ids):
        logits = self.body(input_ids).logits
        return ModelOutput(logits=logits - 30 * (torch.arange(LETTERS + 1) == MASK))


def policy(seed: int = 0) -> Policy:
    return Policy(seed)


def prompts(number: int):
    return lambda generator: torch.zeros(number, 1, dtype=torch.long)


def reward(prompt_ids, completion_ids):
    """Two different letters, and more for a late one first."""
    first, second = completion_ids.unbind(1)
    return (first != second).float() + 0.5 * (first == 2)


def gradient(model):
    return parameters_to_vector([p.grad for p in model.parameters()])


def one_batch(model, method, number, group, grade=reward, seed=0):
    rollouts = Rollouts(
        model, prompts(number), grade, method, length=LENGTH, group=group
    )
    objective = GroupRelative(method)
    return rollouts, objective, objective.corrupt(rollouts(gen(seed)))


def loss_of(model, objective, batch):
    return objective(model, batch).sum() / batch["tokens"].sum()


def test_gradient_is_that_of_the_expected_reward():
    """sum_x p(x) r(x) over all nine completions, written from left to right."""
    model = policy()
    words = strings(LENGTH, LETTERS)
    prompt = torch.zeros(len(words), 1, dtype=torch.long)
    log_p = InOrder()(model, prompt, words).total
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    gains = reward(None, words)
    (-(log_p.exp() * gains).sum()).backward()
    exact = gradient(model)
    model.zero_grad()
    method = methods.just_grpo(**PLAIN)
    _, objective, batch = one_batch(model, method, number=2000, group=8)
    (objective(model, batch).sum() / len(batch["advantage"])).backward()
    found = gradient(model)
    cosine = torch.cosine_similarity(exact, found, dim=0)
    assert cosine > 0.99
    assert 0.9 < found.norm() / exact.norm() < 1.1


@pytest.mark.parametrize("kind", ["group", "mean", "leave_one_out", "batch", "weights"])
def test_advantages_are_centred_and_ordered(kind):
    rewards = torch.rand(5, 4, generator=gen())
    found = advantages(rewards, kind)
    torch.testing.assert_close(found.sum(1), torch.zeros(5), rtol=0, atol=1e-5)
    assert torch.equal(found.argsort(1), rewards.argsort(1))
    shifted = advantages(rewards + 3, kind)
    torch.testing.assert_close(shifted, found, rtol=1e-3, atol=1e-3)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 5.0]])
    found = advantages(rewards, "leave_one_out")
    expected = [1 - 5 / 3, 0 - 2.0, 0 - 2.0, 5 - 1 / 3]
    torch.testing.assert_close(found[0], torch.tensor(expected))


def test_group_advantages_have_unit_spread_and_vanish_on_equal_rewards():
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    found = advantages(rewards, "group")
    assert found[0].std().item() == pytest.approx(1, abs=1e-3)
    assert not found[1].any()


@pytest.mark.parametrize(
    ("ratio", "gain", "value", "moves"),
    [
        (1.5, 1.0, 1.2, False),  # likelier already: no more push
        (1.5, -1.0, -1.5, True),
        (0.5, 1.0, 0.5, True),
        (0.5, -1.0, -0.8, False),
        (1.1, 1.0, 1.1, True),
    ],
)
def test_clip_stops_the_push_on_one_side_only(ratio, gain, value, moves):
    new = torch.tensor([[ratio]]).log().requires_grad_()
    found = surrogate(new, torch.zeros(1, 1), torch.tensor([[gain]]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(value, abs=1e-6)
    assert bool(new.grad.abs() > 0) == moves


def test_without_a_ratio_it_is_the_first_step_of_the_clipped_loss():
    """A ratio of one has the gradient of log p: what a detached old policy does."""
    grads = []
    for clip in (None, 0.2):
        model = policy()
        method = Method(MeanField(0.0), clip=clip)
        _, objective, batch = one_batch(model, method, number=4, group=8)
        loss_of(model, objective, batch).backward()
        grads.append(gradient(model))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_penalty_vanishes_at_the_reference_and_grows_away_from_it():
    model = policy()
    method = Method(MeanField(0.0), kl=1.0)
    rollouts, objective, batch = one_batch(
        model, method, 4, 8, grade=lambda p, c: torch.zeros(len(c))
    )
    assert loss_of(model, objective, batch).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert loss_of(model, objective, batch).item() > 1e-4
    assert rollouts.reference is not model


def test_trajectory_rollouts_need_no_second_pass():
    """The trace's log-probabilities are those of a new evaluation."""
    model = policy()
    _, _, batch = one_batch(model, methods.trajectory(), 4, 8)
    method = Trajectory()
    views = Views(batch["target"], batch["canvas"], batch["weight"])
    with torch.no_grad():
        found = method.evaluate(model, views).tokens
    torch.testing.assert_close(batch["old"], found, rtol=1e-5, atol=1e-5)
    model.zero_grad()


@pytest.mark.parametrize("method", CONFIGURATIONS)
def test_every_configuration_updates_the_policy(method):
    model = policy()
    before = parameters_to_vector(model.parameters()).clone()
    rollouts = Rollouts(model, prompts(4), reward, method, length=LENGTH, group=4)
    steps = method.epochs + 1
    result = fit(
        model,
        rollouts,
        GroupRelative(method),
        steps=steps,
        lr=1e-3,
        warmup=0,
        progress=False,
    )
    after = parameters_to_vector(model.parameters())
    assert (after - before).abs().max() > 1e-5
    assert result.steps == steps
    assert len(rollouts.log) == 2  # the second serves what is left
    assert all(entry["forwards"] == LENGTH for entry in rollouts.log)


@pytest.mark.parametrize("method", [methods.trajectory(), methods.just_grpo()])
def test_reward_rises(method):
    model = policy()
    rollouts = Rollouts(model, prompts(8), reward, method, length=LENGTH, group=8)
    objective = GroupRelative(method)
    fit(model, rollouts, objective, steps=40, lr=1e-2, warmup=0, progress=False)
    first, last = rollouts.log[0]["total"], rollouts.log[-1]["total"]
    assert first < 1.2 and last > 1.4  # 1.5 is the most there is


def test_interrupted_in_the_middle_of_a_rollout_it_goes_on_the_same(tmp_path):
    """Policy, optimiser, generator, and the epochs that the rollout still serves."""

    def run(model, steps, folder):
        method = methods.diffu_grpo(epochs=3)
        rollouts = Rollouts(model, prompts(4), reward, method, length=LENGTH, group=4)
        options = {"lr": 1e-3, "warmup": 0, "progress": False, "save_every": 4}
        objective = StopsAfter(GroupRelative(method), steps)
        try:
            fit(model, rollouts, objective, steps=8, checkpoint=folder, **options)
        except KeyboardInterrupt:
            return None
        return parameters_to_vector(model.parameters()).detach()

    start = policy()
    whole = run(copy.deepcopy(start), 99, tmp_path / "whole")
    assert run(copy.deepcopy(start), 5, tmp_path / "parts") is None
    resumed = run(copy.deepcopy(start), 99, tmp_path / "parts")
    assert torch.equal(whole, resumed)


def test_failed_gradings_are_counted_and_rewards_are_summed():
    def picky(prompt_ids, completion_ids):
        marks = torch.ones(len(completion_ids))
        marks[::4] = torch.nan
        return marks

    model = policy()
    graders = {"picky": picky, "pairs": reward}
    rollouts, _, batch = one_batch(model, methods.trajectory(), 4, 4, grade=graders)
    (entry,) = rollouts.log
    assert entry["failed"] == 4
    assert entry["picky"] == pytest.approx(0.75)
    assert entry["total"] == pytest.approx(entry["picky"] + entry["pairs"])
    assert len(batch["advantage"]) == 16  # none is dropped


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Method(MeanField(), epochs=0), "epochs=0"),
        (lambda: Method(MeanField(), clip=0.0), "clip=0.0"),
        (lambda: Method(MeanField(), kl=-1.0), "kl=-1.0"),
        (lambda: Method(MeanField(), advantage="x"), "advantage='x'"),
        (lambda: Method(MeanField(), level="word"), "level='word'"),
        (lambda: advantages(torch.zeros(2, 1)), "group=1"),
        (lambda: advantages(torch.zeros(2, 2), "x"), "advantage='x'"),
        (
            lambda: Rollouts(
                policy(), prompts(1), reward, methods.wd1(), length=2, group=1
            ),
            "group=1",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_in_the_only_epoch_the_old_policy_is_the_new_one():
    """No forward is spent on it, and loss and gradient are those with it."""
    found = []
    for epochs in (1, 2):
        model = policy()
        method = Method(MeanField(0.0), epochs=epochs)
        _, objective, batch = one_batch(model, method, number=4, group=8)
        assert ("old" in batch) == (epochs > 1)
        loss = loss_of(model, objective, batch)
        loss.backward()
        found.append(torch.cat([loss.detach()[None], gradient(model)]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_both_bounds_of_spg_are_read_from_one_forward():
    model = policy()
    _, objective, batch = one_batch(model, methods.spg(), number=4, group=4)
    calls = []
    model.register_forward_hook(lambda *parts: calls.append(1))
    loss = objective(model, batch)
    assert len(calls) == 1
    views = Views(batch["target"], batch["canvas"], batch["weight"])
    method = methods.spg()
    lower = method.estimator.evaluate(model, views).total
    upper = method.negative.evaluate(model, views).total
    gain = batch["advantage"]
    expected = -gain * torch.where(gain < 0, upper, lower)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
