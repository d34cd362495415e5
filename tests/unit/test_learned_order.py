"""Order and tokens as one trajectory: sums and gradients over all of them."""

import copy
from itertools import permutations

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.nn.utils import parameters_to_vector
from toys import StopsAfter, gen, strings

import dlmlib as dlm
from dlmlib.rl import methods
from dlmlib.rl.estimators import MeanField, Trajectory
from dlmlib.rl.learned_order import OrderedTrajectory, commit_rank
from dlmlib.rl.logprob import Views
from dlmlib.rl.methods import Method
from dlmlib.rl.policy_gradient import GroupRelative, Rollouts
from dlmlib.rl.unmasking_policy import Learned, OrderHead, plackett_luce
from dlmlib.training.fit import fit

LENGTH, LETTERS, MASK = 3, 2, 2
WORDS = strings(LENGTH, LETTERS)


class NeverMask(nn.Module):
    """An output layer that gives the mask no probability."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) - 30 * (torch.arange(LETTERS + 1) == MASK)


def policy(seed: int = 0, spread: float = 0.5):
    """A small network over two letters, and a head that has preferences."""
    model = tiny_model(
        seed,
        vocab_size=LETTERS + 1,
        mask_token_id=MASK,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        model.order_head = OrderHead(model.config)
        model.order_head.score.weight.data.normal_(std=spread)
    model.lm_head = NeverMask(model.lm_head)
    return model


def all_trajectories(sizes):
    """(words, steps, ranks): every word in every order, `sizes` tokens a step."""
    step_of = [step for step, size in enumerate(sizes) for _ in range(size)]
    rank_of = [rank for size in sizes for rank in range(size)]
    rows = []
    for order in permutations(range(LENGTH)):
        if sizes[-1] > 1 and list(order[-sizes[-1] :]) != sorted(order[-sizes[-1] :]):
            continue  # the last step has no order
        step, rank = torch.empty(2, LENGTH, dtype=torch.long)
        step[list(order)] = torch.tensor(step_of)
        rank[list(order)] = torch.tensor(rank_of)
        rows += [(word, step, rank) for word in WORDS]
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def scored(model, sizes, estimator=None, **options):
    words, step, rank = all_trajectories(sizes)
    prompt = torch.zeros(len(words), 1, dtype=torch.long)
    estimator = estimator or OrderedTrajectory()
    options = {"commit_rank": rank} | options
    return words, estimator(model, prompt, words, commit_step=step, **options)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (1, 2), (3,)])
def test_probabilities_of_all_trajectories_sum_to_one(sizes):
    _, found = scored(policy(), sizes)
    assert found.total.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert found.forwards == len(sizes)
    assert not found.tokens[:, 0].any()  # the prompt


def test_blocks_are_an_order_of_their_own():
    """Blocks of two: the last column is written last, with a chance of one."""
    model = policy()
    words, step, _ = all_trajectories((1, 1, 1))
    allowed = step[:, 2] == 2
    prompt = torch.zeros(int(allowed.sum()), 1, dtype=torch.long)
    estimator = OrderedTrajectory(block_length=2)
    found = estimator(model, prompt, words[allowed], commit_step=step[allowed])
    assert found.total.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_untrained_the_order_is_uniform():
    model = policy(spread=0.0)
    words, step, _ = all_trajectories((1, 1, 1))
    prompt = torch.zeros(len(words), 1, dtype=torch.long)
    tokens = Trajectory()(model, prompt, words, commit_step=step).total
    found = OrderedTrajectory()(model, prompt, words, commit_step=step).total
    log_6 = torch.full_like(tokens, 6.0).log()
    torch.testing.assert_close(tokens - found, log_6, rtol=0, atol=1e-5)


def reward(prompt_ids, completion_ids):
    """Something that depends on all letters together."""
    first, second, third = completion_ids.unbind(1)
    return (first != second).float() + 0.7 * (second == third) * third


def prompts(number: int):
    return lambda generator: torch.zeros(number, 1, dtype=torch.long)


def gradients(model):
    """Of the head, and of the network."""
    named = dict(model.named_parameters())
    head = [p.grad for n, p in named.items() if n.startswith("order_head")]
    network = [p.grad for n, p in named.items() if not n.startswith("order_head")]
    return [parameters_to_vector(part) for part in (head, network)]


def rolled_out(model, method, number, group=8, seed=0):
    rollouts = Rollouts(model, prompts(number), reward, method, length=3, group=group)
    return GroupRelative(method).corrupt(rollouts(gen(seed)))


@pytest.mark.parametrize(("steps", "sizes"), [(None, (1, 1, 1)), (2, (2, 1))])
def test_gradient_is_that_of_the_expected_reward(steps, sizes):
    """sum over all orders and words of p r, by head and by network."""
    model = policy(spread=0.3)
    words, found = scored(model, sizes)
    (-(found.total.exp() * reward(None, words)).sum()).backward()
    exact = gradients(model)
    model.zero_grad()
    method = methods.dcolt(steps=steps, advantage="leave_one_out")
    batch = rolled_out(model, method, number=2500)
    loss = GroupRelative(method)(model, batch).sum() / len(batch["advantage"])
    loss.backward()
    for part, sampled in zip(exact, gradients(model), strict=True):
        assert torch.cosine_similarity(part, sampled, dim=0) > 0.97
        assert 0.85 < sampled.norm() / part.norm() < 1.15


@pytest.mark.parametrize(("steps", "block"), [(3, None), (2, None), (3, 2)])
def test_it_scores_what_the_rollout_drew(steps, block):
    """Scores of the head and of the tokens, as they were while decoding."""
    model, heard = policy(), []
    model.order_head.register_forward_hook(
        lambda m, args, h: heard.append((*args[2:], h.clone()))
    )
    options = {"propose": Learned(model.order_head, gen(1)), "steps": steps}
    options |= {"temperature": 1.0, "trace": True, "generator": gen(2)}
    prompt = torch.zeros(32, 1, dtype=torch.long)
    out = dlm.decode(model, prompt, length=LENGTH, block_length=block, **options)
    step, rank = out.trace.commit_step[:, 1:], commit_rank(out.trace)[:, 1:]
    terms = out.trace.commit_logprob[:, 1:].clone()
    for number, (masked, inside, h) in enumerate(heard[:-1]):  # the last has no choice
        assert torch.equal(masked, step >= number)
        now = torch.where(step == number, rank, -1)
        terms += plackett_luce(h, masked & inside, now)
    answer, given = out.sequences[:, 1:], {"commit_step": step, "commit_rank": rank}
    found = OrderedTrajectory(block)(model, prompt, answer, **given)
    torch.testing.assert_close(found.tokens[:, 1:], terms, rtol=1e-4, atol=1e-5)


def test_ranks_are_the_order_of_the_noisy_scores():
    model = policy()
    options = {"propose": Learned(model.order_head, gen(1)), "steps": 2, "trace": True}
    prompt = torch.zeros(20, 1, dtype=torch.long)
    out = dlm.decode(model, prompt, length=3, **options)
    rank, step = commit_rank(out.trace), out.trace.commit_step
    assert (rank[:, 0] == -1).all()
    for row in range(20):
        first = (step[row] == 0).nonzero()[:, 0]
        scores = out.trace.score[0, row, first]
        assert (
            rank[row, first].tolist()
            == scores.argsort(descending=True).argsort(0).tolist()
        )
        assert rank[row, step[row] == 1].tolist() == [0]


def changed(model, before):
    after = dict(model.named_parameters())
    return {n for n, old in before.items() if not torch.equal(old, after[n])}


@pytest.mark.parametrize("only_head", [False, True])
def test_reward_rises_and_frozen_parts_stay(only_head):
    model = policy(spread=0.0)
    if only_head:
        model.requires_grad_(False)
        model.order_head.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = methods.dcolt()
    rollouts = Rollouts(model, prompts(8), reward, method, length=3, group=16)
    fit(
        model,
        rollouts,
        GroupRelative(method),
        steps=40,
        lr=1e-2,
        warmup=0,
        progress=False,
    )
    moved = changed(model, before)
    head = {n for n in moved if n.startswith("order_head")}
    assert head and (moved == head if only_head else len(moved) > len(head))
    total = torch.tensor([entry["total"] for entry in rollouts.log])
    assert total[-10:].mean() > total[:5].mean() + (0.01 if only_head else 0.2)


def test_head_and_network_resume_together(tmp_path):
    def run(model, updates, folder):
        rollouts = Rollouts(
            model, prompts(4), reward, methods.dcolt(), length=3, group=4
        )
        objective = StopsAfter(GroupRelative(methods.dcolt()), updates)
        options = {"lr": 1e-3, "warmup": 0, "progress": False, "save_every": 2}
        try:
            fit(model, rollouts, objective, steps=6, checkpoint=folder, **options)
        except KeyboardInterrupt:
            return None
        return parameters_to_vector(model.parameters()).detach()

    start = policy()
    whole = run(copy.deepcopy(start), 99, tmp_path / "whole")
    assert run(copy.deepcopy(start), 3, tmp_path / "parts") is None
    assert torch.equal(whole, run(copy.deepcopy(start), 99, tmp_path / "parts"))


def test_masks_inside_a_text_are_filled_and_given_tokens_left_alone():
    """_ 0 _ after one prompt token: two tokens are drawn, in two orders."""
    model = policy()
    rows = [(a, b, s) for a in range(2) for b in range(2) for s in range(2)]
    words = torch.tensor([(a, 0, b) for a, b, _ in rows])
    step = torch.tensor([(s, -1, 1 - s) for *_, s in rows])
    prompt = torch.zeros(len(rows), 1, dtype=torch.long)
    found = OrderedTrajectory()(model, prompt, words, commit_step=step)
    assert found.total.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert not found.tokens[:, 2].any()

    def canvases(generator):
        return torch.tensor([[0, MASK, 0, MASK]]).repeat(3, 1)

    method = methods.dcolt()
    rollouts = Rollouts(model, canvases, reward, method, length=0, group=8)
    batch = GroupRelative(method).corrupt(rollouts(gen()))
    assert (batch["target"][:, 2] == 0).all() and (batch["tokens"] == 2).all()
    views = Views(batch["target"], batch["canvas"], batch["weight"], rank=batch["rank"])
    total = OrderedTrajectory().evaluate(model, views).total
    state = tuple(torch.stack([batch["target"][:, 1], batch["target"][:, 3]]))
    first = batch["weight"][:, 0, 1] == 1
    known = {row: value for row, value in zip(rows, found.total.tolist(), strict=True)}
    for a, b, early, value in zip(*state, first, total.tolist(), strict=True):
        assert value == pytest.approx(known[int(a), int(b), int(~early)], abs=1e-4)


def test_wrong_inputs_are_named():
    model = policy()
    with pytest.raises(ValueError, match="block_length=0"):
        OrderedTrajectory(block_length=0)
    with pytest.raises(ValueError, match="commit_rank"):
        scored(model, (2, 1), commit_rank=None)
    with pytest.raises(ValueError, match="commit_step"):
        OrderedTrajectory()(model, torch.zeros(1, 1).long(), WORDS[:1])
    with pytest.raises(ValueError, match="order_head"):
        scored(tiny_model(), (1, 1, 1))
    with pytest.raises(ValueError, match="order_head"):
        rolled_out(tiny_model(), methods.dcolt(), 1)
    method = Method(MeanField(0.0))
    given = Rollouts(
        model, lambda g: torch.tensor([[0, MASK]]), reward, method, length=0
    )
    with pytest.raises(ValueError, match="estimator"):
        given(gen())
