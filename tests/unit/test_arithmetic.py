"""Arithmetic: totals by hand, one right answer a problem, and splits that are apart."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import dlmlib as dlm
from dlmlib.tasks.arithmetic import FORMS, Arithmetic, freeze

EVAL = Path(__file__).parents[2] / "data" / "eval"
FROZEN = dict(
    arithmetic_8=Arithmetic("chain"),
    arithmetic_depth_8=Arithmetic("chain", neutral=0.0),
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(text, modulus=7):
    """Running totals of "3 +5 *2", with Python's own arithmetic."""
    start, *operations = text.split()
    totals, total = [], int(start)
    for word in operations:
        number = int(word[1:])
        total = (total + number if word[0] == "+" else total * number) % modulus
        totals.append(total)
    return totals


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("modulus", [3, 7, 11])
def test_every_total_and_answer_is_the_one_by_hand(form, modulus):
    task = Arithmetic(form, operations=5, fewest=1, modulus=modulus)
    rows = task.sample(200, generator())
    for row, answer, depth in zip(
        rows, task.solve(rows), task.depth(rows), strict=True
    ):
        problem, work = task.render(row).split(" =")
        totals, work = by_hand(problem, modulus), work.split()
        assert answer == totals[-1] == int(work[-1])
        if form == "chain":
            assert list(map(int, work)) == totals
        if form == "sentence":
            assert list(map(int, work[: len(totals)])) == totals
            so = len(work) - len(totals) - 3
            assert work[len(totals) :] == ["so"] * so + ["answer", "is", work[-1]]
        words = problem.split()[1:]
        assert depth == sum(word not in ("+0", "*1") for word in words)


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_graded_right_and_any_other_answer_wrong(form):
    task = Arithmetic(form, fewest=2)
    rows = task.sample(100, generator(1))
    assert task.grade(rows).all()
    assert torch.equal(task.parse(rows), task.solve(rows))
    numbers = (rows >= task.zero) & (rows < task.zero + task.modulus)
    numbers[:, : task.prompt_length] = False
    last = torch.where(numbers, torch.arange(task.length), -1).amax(1)
    for shift in range(1, task.modulus):
        wrong = rows.clone()
        answer = (task.solve(rows) + shift) % task.modulus
        wrong[torch.arange(100), last] = answer + task.zero
        assert not task.grade(wrong).any()
        assert torch.equal(task.parse(wrong), answer)


def test_rows_that_state_no_number_are_wrong():
    for form in FORMS:
        task = Arithmetic(form)
        rows = task.sample(20, generator())
        for token in (task.tokenizer.eos_token_id, 1, task.id["so"], task.id["+0"]):
            rows[:, task.prompt_length :] = token
            assert (task.parse(rows) == -1).all() and not task.grade(rows).any()
    task = Arithmetic("sentence")
    rows = task.sample(20, generator())
    rows[rows == task.id["answer"]] = task.id["so"]
    assert (task.parse(rows) == -1).all()  # "is 3" alone does not count


def test_the_first_statement_counts_and_what_follows_does_not():
    task = Arithmetic("sentence", operations=2, spare=5)
    words = "[BOS] 3 +1 *2 = 4 1 answer is 1 answer is 5 2 [EOS]"
    rows = torch.tensor([task.tokenizer.encode(words)])
    assert rows.shape[1] == task.length
    assert task.parse(rows).tolist() == [1] and task.grade(rows).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(FORMS), st.integers(1, 9))
def test_rows_have_the_promised_layout(seed, form, operations):
    task = Arithmetic(form, operations=operations, fewest=1)
    batch = task.batch(30, generator(seed))
    ids, maskable = batch["input_ids"], batch["maskable"]
    assert ids.shape == maskable.shape == (30, task.length)
    assert (ids[:, 0] == task.tokenizer.bos_token_id).all()
    assert (ids[:, task.prompt_length - 1] == task.id["="]).all()
    assert not maskable[:, : task.prompt_length].any()
    assert maskable[:, task.prompt_length :].all()
    assert (ids != task.tokenizer.mask_token_id).all()
    blank = task.blank(ids)
    assert torch.equal(blank == task.tokenizer.mask_token_id, maskable)
    assert torch.equal(task.solve(blank), task.solve(ids))


def test_operations_and_their_totals_are_a_fixed_distance_apart():
    task = Arithmetic("chain", operations=6, fewest=3)
    rows = task.sample(100, generator())
    used = rows[:, 2 : task.prompt_length - 1] != task.tokenizer.pad_token_id
    totals = rows[:, 2 + 7 : 2 + 7 + 6] != task.tokenizer.eos_token_id
    assert torch.equal(used, totals)


def test_draws_follow_the_arguments():
    task = Arithmetic("chain", operations=6, fewest=4, neutral=0.25)
    drawn = task._draw(6000, generator(2))
    used = drawn[:, 1:] != task.tokenizer.pad_token_id
    assert chisquare(torch.bincount(used.sum(1), minlength=7)[4:]).pvalue > 1e-3
    assert chisquare(torch.bincount(drawn[:, 0] - task.zero)).pvalue > 1e-3
    active = (drawn[:, 1:, None] == task.active_ids).any(-1)
    share = active[used].double().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / used.sum().item()) ** 0.5
    counts = torch.bincount(drawn[:, 1:][active])[task.active_ids]
    assert len(counts) == 6 + 5 and chisquare(counts).pvalue > 1e-3


def test_sums_only_add():
    task = Arithmetic("chain", operators="+", neutral=0.5)
    rows = task.sample(200, generator())
    for row in rows[:50]:
        assert "*" not in task.render(row)
    assert 3.5 < task.depth(rows).double().mean() < 4.5


def test_a_share_drawn_per_problem_makes_every_depth_about_equally_common():
    """Binomial(N, q) with q ~ U(0, 1) is uniform on 0 … N."""
    task = Arithmetic("chain", operations=8)
    drawn = task._draw(9000, generator(3))
    depth = (drawn[:, 1:, None] == task.active_ids).any(-1).sum(1)
    assert chisquare(torch.bincount(depth, minlength=9)).pvalue > 1e-3


def test_the_place_of_the_answer_is_uniform_over_all_that_fit():
    task = Arithmetic("sentence", operations=4, spare=3)
    rows = task.sample(4000, generator(4))
    place = (rows == task.id["answer"]).long().argmax(1) - task.prompt_length
    assert chisquare(torch.bincount(place)[4:]).pvalue > 1e-3
    assert place.min() == 4 and place.max() == task.completion_length - 3


def test_adding_and_scaling_do_not_commute():
    task = Arithmetic("answer", operations=2)
    rows = task.encode(["3 +5 *2", "3 *2 +5"])
    assert task.solve(rows).tolist() == [2, 4]


def test_no_problem_is_in_both_splits_and_the_form_does_not_matter():
    words = {}
    for form, operations in [("chain", 3), ("sentence", 5)]:
        task = Arithmetic(form, operations=operations, fewest=1)
        for split in ("train", "test"):
            rows = task.sample(3000, generator(5), split=split)
            problems = {task.render(row).split(" =")[0] for row in rows}
            words.setdefault(split, set()).update(problems)
    assert not words["train"] & words["test"]
    share = task.held_out(task._draw(20_000, generator(6))).double().mean()
    assert 0.1 < share < 0.15


@pytest.mark.parametrize("name", FROZEN)
def test_the_frozen_sets_are_as_made_and_never_trained_on(name):
    lines = (EVAL / f"{name}.jsonl").read_text().splitlines()
    stored = [json.loads(line) for line in lines]
    assert stored == freeze(FROZEN[name], 512, seed=2025)
    task = FROZEN[name]
    rows = task.encode([entry["problem"] for entry in stored])
    assert task.held_out(task.problems(rows)).all()
    assert task.solve(rows).tolist() == [entry["answer"] for entry in stored]
    assert task.depth(rows).tolist() == [entry["depth"] for entry in stored]
    if name == "arithmetic_depth_8":
        assert (task.depth(rows) == 8).all()


def test_encoding_puts_the_answer_of_a_sentence_into_the_last_column():
    task = Arithmetic("sentence", operations=4)
    rows = task.encode(["3 +5 *2", "1 *1 +0 +0 +6"])
    assert (rows[:, -1] == task.solve(rows) + task.zero).all()
    assert task.grade(rows).all()
    blank = task.blank(rows, suffix=True)
    assert torch.equal(blank[:, -3:-1], rows[:, -3:-1])
    assert (blank[:, -1] == task.tokenizer.mask_token_id).all()


def test_an_ideal_completion_survives_the_decoder():
    """Masks anywhere in the prompt are filled: a model that knows gets full marks."""
    task = Arithmetic("sentence", fewest=3)
    rows = task.encode(["3 +5 *2", "1 +1 +1 +1"])

    def oracle(ids):
        logits = torch.nn.functional.one_hot(rows[: len(ids)], len(task.tokenizer))
        return type("Output", (), {"logits": 9.0 * logits})

    mask = task.tokenizer.mask_token_id
    for suffix in (False, True):
        blank = task.blank(rows, suffix=suffix)
        out = dlm.decode(oracle, blank, steps=4, mask_token_id=mask)
        assert task.grade(out.sequences).all()


def test_the_same_seed_draws_the_same_rows():
    task = Arithmetic("sentence")
    first, second = (task.sample(50, generator(7)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "arguments, name",
    [
        (dict(form="prose"), "form"),
        (dict(operations=0), "operations"),
        (dict(operations=3, fewest=4), "fewest"),
        (dict(fewest=0), "fewest"),
        (dict(operators="*"), "operators"),
        (dict(neutral=1.5), "neutral"),
        (dict(spare=-1), "spare"),
        (dict(modulus=6), "modulus"),
        (dict(modulus=2), "modulus"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        Arithmetic(**arguments)


def test_wrong_calls_are_named():
    task = Arithmetic("chain", operations=2)
    rows = task.sample(2, generator())
    for call, name in [
        (lambda: task.sample(0, generator()), "n="),
        (lambda: task.sample(2, generator(), split="dev"), "split"),
        (lambda: task.blank(rows, suffix=True), "suffix"),
        (lambda: task.encode(["3 +9"]), "word"),
        (lambda: task.encode(["3 + 5"]), "problems"),
        (lambda: task.encode(["3"]), "problems"),
        (lambda: task.encode(["+3 +5"]), "problems"),
        (lambda: task.encode(["3 +5 5"]), "problems"),
        (lambda: task.encode(["3 +5 ="]), "problems"),
        (lambda: task.encode(["3 +5 +5 +5"]), "problems"),
    ]:
        with pytest.raises(ValueError, match=name):
            call()
