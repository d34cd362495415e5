"""The gradually revealed problem: who is right, and what the data say when."""

from itertools import product

import pytest
import torch

from dlmlib.device import generator
from dlmlib.tasks.revealed import (
    DATA,
    HELD_OUT,
    PROTOCOLS,
    SHARDS,
    Chat,
    Slots,
    Sums,
    frozen_path,
    held_out,
    turns_of,
    write_frozen,
)

ALL = torch.tensor(list(product(range(3), repeat=6)))
EVERY = torch.tensor(list(product(range(3), repeat=5)))  # all problems


@pytest.mark.parametrize("known", [0, 0b10001, 0b10101, 0b11111, 0b01010])
def test_answers_are_uniform_among_those_that_fit(known):
    task = Sums()
    sums = task.problems(1, generator(3))
    said = torch.tensor([bool(known >> i & 1) for i in range(5)])
    fits = ((task.sums(ALL) == sums) | ~said).all(1)
    assert fits.sum() == 3 ** (6 - int(said.sum()))
    draws = task.answers(
        20_000, sums.expand(20_000, -1), said.expand(20_000, -1), generator(1)
    )
    code = (draws * 3 ** torch.arange(6)).sum(1)
    counts = torch.bincount(code, minlength=729).double()
    right = (ALL[fits] * 3 ** torch.arange(6)).sum(1)
    assert counts[right].sum() == 20_000
    expected = 20_000 / len(right)
    chi2 = ((counts[right] - expected) ** 2 / expected).sum().item()
    freedom = len(right) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_grade_is_the_definition():
    task = Sums()
    sums = task.problems(1, generator(0))
    expected = (task.sums(ALL) == sums).all(1)
    assert expected.sum() == 3
    assert torch.equal(task.grade(ALL + task.zero, sums.expand(len(ALL), -1)), expected)
    noise = torch.full((1, 6), task.colon)
    assert not task.grade(noise, sums).any()
    assert not task.met(noise, sums).any()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_say_everything(protocol):
    turns = turns_of(protocol)
    assert {c for said in turns for c in said} == set(range(5))
    last = set(turns[-1]) == set(range(5))
    assert last == (protocol != "sharded")
    assert len(turns) == {"full": 1, "concatenated": 1, "recap": 4}.get(protocol, 3)


def test_slots_show_exactly_what_is_known():
    task = Slots()
    batch = task.batch(500, generator(0))
    slots = batch["input_ids"][:, 1:6]
    digits = batch["input_ids"][:, 7:]
    known = slots != task.unknown
    met = task.met(digits, slots - task.zero)
    assert met[known].all()
    assert 0.4 < known.float().mean() < 0.6
    assert torch.equal(batch["maskable"][0], torch.arange(13) >= 7)
    assert [task.known(t).sum().item() for t in range(3)] == [2, 3, 5]
    said = task.prompt(slots - task.zero, known)
    assert torch.equal(said, batch["input_ids"][:, :7])


@pytest.mark.parametrize("data", ["single", "hindsight", "honest"])
def test_batches_hold_the_conversations_of_their_data(data):
    task, draws, widths = Chat(data), generator(0), set()
    for _ in range(30):
        batch = task.batch(20, draws)
        ids, answers = batch["input_ids"], batch["maskable"].sum(1)
        whole = ids[answers == 6]
        assert len(whole) == (20 if data == "single" else 10)
        assert (whole[:, 18:] == task.tokenizer.pad_token_id).all()
        assert not (whole[:, :18] == task.tokenizer.pad_token_id).any()
        widths.add(ids.shape[1])
    chats = {task.columns(turns_of(p)) for p in PROTOCOLS[2:]}
    assert widths == ({18} if data == "single" else chats)


@pytest.mark.parametrize("data", ["hindsight", "honest"])
def test_chats_answer_as_their_data_say(data):
    task = Chat(data)
    chats, scored = task.conversation(1000, SHARDS, generator(0))
    assert scored.sum() == 18_000
    sums = torch.stack([chats[:, c] for c in (2, 22, 13, 24, 4)], 1) - task.zero
    first, second, last = chats[:, 6:12], chats[:, 15:21], chats[:, 26:32]
    assert task.grade(last, sums).all()
    met = task.met(first, sums)
    assert met[:, [0, 4]].all()
    early = met[:, [1, 2, 3]].float().mean()
    assert early == 1 if data == "hindsight" else abs(early - 1 / 3) < 0.05
    kept = (first == last).all(1) & (second == last).all(1)
    assert kept.all() if data == "hindsight" else kept.float().mean() < 0.1


def test_every_protocol_fits_and_messages_read_back():
    task = Chat()
    sums = task.problems(4, generator(0))
    assert task.length == task.columns(turns_of("recap"))
    text = task.tokenizer.decode(task.message(sums, SHARDS[0])[0])
    assert text == f"c1 {sums[0, 0]} c5 {sums[0, 4]} :"
    for protocol in PROTOCOLS:
        assert task.columns(turns_of(protocol)) <= task.length


# ---- held-out problems


def code(sums):
    """A number for each problem: its row in EVERY."""
    return (sums * 3 ** torch.arange(4, -1, -1)).sum(1)


def test_every_problem_is_on_one_side_and_both_sides_are_drawn():
    side = held_out(EVERY)
    assert torch.equal(held_out(EVERY.flip(0)).flip(0), side)
    assert abs(side.double().mean() - 1 / HELD_OUT) < 0.05
    for condition, value in product(range(5), range(3)):
        share = side[EVERY[:, condition] == value].double().mean()
        assert abs(share - 1 / HELD_OUT) < 0.1, (condition, value)
    for evaluation in (False, True):
        drawn = Sums().problems(20_000, generator(0), evaluation)
        counts = torch.bincount(code(drawn), minlength=243)
        assert torch.equal(counts > 0, side == evaluation)
        expected = 20_000 / (side == evaluation).sum()
        chi2 = ((counts[counts > 0] - expected) ** 2 / expected).sum()
        freedom = (side == evaluation).sum() - 1
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(("modulus", "digits"), [(2, 7), (3, 5), (4, 4), (8, 3)])
def test_small_problems_have_both_sides(modulus, digits):
    task = Sums(modulus, digits, [range(digits - 1)])
    for evaluation in (False, True):
        assert (
            held_out(task.problems(50, generator(0), evaluation)) == evaluation
        ).all()


def test_slots_never_say_all_of_a_held_out_problem():
    task = Slots()
    slots = task.batch(20_000, generator(0))["input_ids"][:, 1:6]
    whole = (slots != task.unknown).all(1)
    assert whole.sum() > 2000
    said = slots[whole] - task.zero
    assert not held_out(said).any()
    assert len(said.unique(dim=0)) == (~held_out(EVERY)).sum()


@pytest.mark.parametrize("data", DATA)
def test_chats_never_say_all_of_a_held_out_problem(data):
    """Read from the tokens: the value behind each name."""
    task, draws, seen = Chat(data), generator(0), []
    for _ in range(60):
        ids = task.batch(128, draws)["input_ids"]
        sums = torch.full((len(ids), 5), -1)
        for condition in range(5):
            row, column = (ids[:, :-1] == task.name + condition).nonzero().T
            sums[row, condition] = ids[row, column + 1] - task.zero
        assert ((sums >= 0) & (sums < 3)).all(), "every row says everything at last"
        seen.append(sums)
    seen = torch.cat(seen)
    assert not held_out(seen).any()
    assert len(seen.unique(dim=0)) == (~held_out(EVERY)).sum()


def test_the_frozen_set_is_what_is_held_out_and_made_by_the_code(tmp_path, monkeypatch):
    task = Chat()
    problems = task.frozen()
    expected = torch.arange(243)[held_out(EVERY)]
    assert torch.equal(code(problems).sort().values, expected)
    assert torch.equal(problems, Slots().frozen())
    path = tmp_path / "again.jsonl"
    text = frozen_path(task).read_text()
    monkeypatch.setattr("dlmlib.tasks.revealed.frozen_path", lambda task: path)
    write_frozen(task)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Chat("lucky"), "data='lucky'"),
        (lambda: Sums(1), "modulus=1"),
        (lambda: Sums(3, 5), "shards"),
        (lambda: Sums(3, 4, [range(3)]), "digits=4"),
        (lambda: Sums().problems(0, generator(0)), "n=0"),
        (lambda: Sums(5).frozen(), "modulus=5: expected one with a file revealed_5_6"),
        (lambda: turns_of("whole"), "protocol='whole'"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
