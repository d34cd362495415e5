"""The chat task: its text, its laws, its rows."""

import pytest
import torch
from scipy import stats

from dlmlib.device import generator
from dlmlib.tasks.chat import ANIMALS, FORMS, LABELS, LIKELY, Chat, solutions


@pytest.fixture(scope="module")
def chat():
    return Chat()


@pytest.fixture(scope="module")
def drawn(chat):
    return chat.exchanges(3000, generator(0))


def is_dial(exchange) -> bool:
    return exchange.question.startswith("Dial")


def test_every_answer_is_right_and_every_word_a_token(chat, drawn):
    unknown = 0
    for exchange in drawn:
        assert chat.grade(exchange.question, exchange.answer)
        ids = chat.tokenizer.encode(exchange.answer, add_special_tokens=False)
        assert chat.tokenizer.decode(ids) == exchange.answer
        unknown += len(ids) != len(exchange.answer.replace(".", " .").split())
    assert unknown == 0


def test_the_number_of_steps_is_uniform(drawn):
    """And what is told are the first ones."""
    dials = [e for e in drawn if is_dial(e)]
    assert abs(len(dials) / len(drawn) - 0.7) < 4 * (0.21 / len(drawn)) ** 0.5
    told = [e.answer.partition("so ")[0].split()[::2] for e in dials]
    assert all("".join(labels) == LABELS[: len(labels)] for labels in told)
    counts = [sum(len(t) == k for t in told) for k in range(len(LABELS))]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_marks_are_the_partial_sums(drawn):
    for exchange in filter(is_dial, drawn[:300]):
        head, _, moves = exchange.question.partition(": ")
        place, marks = int(head.split()[-1]), []
        for move in moves.split()[1::2]:
            place = (place + int(move)) % Chat.marks
            marks.append(str(place))
        steps, _, last = exchange.answer.removesuffix(".").partition("so ")
        told = steps.split()[1::2]
        assert told == marks[: len(told)] and last == marks[-1]


def test_forms_and_foods_follow_their_law(drawn):
    facts = [e for e in drawn if not is_dial(e)]
    starts = [form.split()[0] for form in FORMS]
    seen = [sum(e.answer.split()[0] == s for e in facts) for s in starts]
    expected = [p * len(facts) for p in FORMS.values()]
    assert stats.chisquare(seen, expected).pvalue > 1e-3
    meals = [e for e in facts if "eat" in e.question]
    first = sum(ANIMALS[e.question.split()[3]][0] in e.answer for e in meals)
    assert stats.binomtest(first, len(meals), LIKELY).pvalue > 1e-3


def test_rows_are_prompt_answer_end_filler(chat):
    batch = Chat(everywhere=0.0).batch(50, generator(1))
    for ids, maskable in zip(batch["input_ids"], batch["maskable"], strict=True):
        start = int(maskable.int().argmax())
        assert maskable[start:].all() and not maskable[:start].any()
        text = chat.tokenizer.decode(ids[:start])
        assert text.startswith(
            "<|startoftext|><|start_header_id|>user<|end_header_id|>"
        )
        assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
        end = start + int((ids[start:] == chat.end).int().argmax())
        assert (ids[end + 1 :] == chat.filler).all() and len(ids) - end > 4
        question = chat.tokenizer.decode(ids[6 : start - 6])  # inside the format
        assert chat.grade(question, chat.render(ids[start:]))


def test_some_rows_hide_their_prompt_too():
    maskable = Chat(everywhere=0.25).batch(400, generator(2))["maskable"]
    share = maskable.all(1).double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_a_dial_may_be_kept_moving():
    drawn = Chat(dial=1.0, still=0.0).exchanges(200, generator(5))
    moves = [w for e in drawn for w in e.question.partition(": ")[2].split()[1::2]]
    assert stats.chisquare([moves.count(m) for m in "1234"]).pvalue > 1e-3
    assert len(moves) == 6 * len(drawn) and "0" not in moves


def test_wrong_answers_fail(chat):
    assert not chat.grade("What does the cow eat?", "The cow eats moo.")
    assert not chat.grade("What does the cow eat?", "")
    assert solutions("What does the owl eat?", 5) == {"mice", "frogs"}
    assert solutions("Dial at 4: a 1 b 1 c 0 d 0 e 0 f 2", 5) == {"3"}


def test_a_seed_is_a_batch(chat):
    first, again, other = (chat.sample(8, generator(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
