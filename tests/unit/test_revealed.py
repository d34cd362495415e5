"""The gradually revealed problem: who is right, and what the data say when."""

from itertools import product

import pytest
import torch

from dlmlib.device import generator
from dlmlib.tasks.revealed import PROTOCOLS, SHARDS, Chat, Slots, Sums, turns_of

ALL = torch.tensor(list(product(range(3), repeat=6)))


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Chat("lucky"), "data='lucky'"),
        (lambda: Sums(1), "modulus=1"),
        (lambda: Sums(3, 5), "shards"),
        (lambda: turns_of("whole"), "protocol='whole'"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
