"""Two processes share a rollout: half the decoding each, one policy in the end."""

import os

import pytest
import torch
from processes import start_two, wait_for
from tiny import tiny_model
from toys import gen

from dlmlib.rl import methods, shares
from dlmlib.rl.lora import add_lora
from dlmlib.rl.policy_gradient import GroupRelative, Rollouts
from dlmlib.training.checkpoints import load_tensors, save_tensors
from dlmlib.training.fit import fit

MASK, LENGTH = 3, 4


def prompts(generator):
    return torch.randint(4, 8, (4, 2), generator=generator)


def reward(prompt, completion):
    return (completion % 2).float().mean(1)


def train(method, seed: int, folder=None):
    """A few updates of adapters; what is left, and what the rollouts logged."""
    model = add_lora(tiny_model(seed, vocab_size=8, mask_token_id=MASK), 2)
    rollouts = Rollouts(model, prompts, reward, method, length=LENGTH, group=2)
    rows = []
    model.register_forward_hook(lambda m, given, out: rows.append(len(given[0])))
    options = {"steps": 4, "lr": 1e-2, "progress": False}
    fit(model, rollouts, GroupRelative(method), **options)
    if folder is not None:
        rank = shares.processes()[0]
        info = {"log": rollouts.log, "rows": rows[0], "method": str(method)[:10]}
        save_tensors(f"{folder}/{rank}.safetensors", model.state_dict(), info)
    return model, rollouts.log, rows


WORKER = """
import sys
sys.path.insert(0, {tests!r})
from test_shares import METHODS, train
train(METHODS[{name!r}], 0, {folder!r})
"""
METHODS = {
    "trajectory": methods.trajectory(decode={"commit": None, "steps": 3}),
    "diffu": methods.diffu_grpo(epochs=2, kl=0.1, advantage="batch"),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_share_the_rollouts(name, tmp_path):
    tests = os.path.dirname(__file__)
    script = WORKER.format(tests=tests, folder=str(tmp_path), name=name)
    wait_for(start_two(script))
    (first, info), (second, other) = (
        load_tensors(tmp_path / f"{rank}.safetensors") for rank in range(2)
    )
    assert info["log"] == other["log"], "both know the rewards of all completions"
    assert info["rows"] == other["rows"] == 4, "half of the eight rows were decoded"
    start = add_lora(tiny_model(0, vocab_size=8, mask_token_id=MASK), 2).state_dict()
    moved = 0.0
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=0, atol=0)
        moved += (tensor - start[key]).abs().sum().item()
    assert moved > 1e-3
    _, log, rows = train(METHODS[name], 0)
    assert rows[0] == 8 and len(log) == len(info["log"])


def test_alone_everything_is_ones_own():
    generator, given = gen(0), {"input_ids": torch.arange(6).view(3, 2)}
    before = generator.get_state()
    own, same = shares.own_share(given, generator)
    assert own is given and same is generator
    assert torch.equal(before, generator.get_state())
    rows = torch.rand(3, 2, 4)
    assert shares.of_all(rows) is rows and torch.equal(shares.mine(rows), rows)


def test_shares_are_disjoint_and_complete(monkeypatch):
    given = {"input_ids": torch.arange(8).view(4, 2)}
    parts, draws = [], []
    for rank in range(2):
        monkeypatch.setattr(shares, "processes", lambda rank=rank: (rank, 2))
        shared = gen(3)
        own, private = shares.own_share(given, shared)
        parts.append(own["input_ids"])
        draws.append((torch.rand(1, generator=private), shared.get_state()))
    assert sorted(torch.cat(parts)[:, 0].tolist()) == [0, 2, 4, 6]
    assert draws[0][0] != draws[1][0], "different completions"
    assert torch.equal(draws[0][1], draws[1][1]), "the same next prompts"
    with pytest.raises(ValueError, match=r"rollout=3: .*multiple of 2"):
        shares.own_share({"input_ids": torch.zeros(3, 2)}, gen(0))
