"""Cups: group laws, both ways to write a product, and what is kept for evaluation."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from dlmlib.tasks.permutations import (
    ARRANGEMENTS,
    HELD_OUT,
    Permutations,
    frozen_path,
    held_out,
    product_table,
    running_products,
    write_frozen,
)

TASKS = [
    Permutations(6, "chain", 2),
    Permutations(6, "streams", 2),
    Permutations(6, "streams", 3, reorder=True),
    Permutations(6, "answer", 3),
]
IDS = ["chain", "streams", "reordered", "answer"]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def by_hand(shuffles):
    """Move three cups about, one shuffle after the other."""
    cups = "abc"
    for shuffle in shuffles:
        cups = "".join(cups["abc".index(letter)] for letter in ARRANGEMENTS[shuffle])
    return cups


def words(task, ids):
    return task.tokenizer.decode(ids).split()


# ---- the group


def test_the_table_is_the_group_of_three_cups():
    table, six = product_table(), range(6)
    assert (table[0] == torch.arange(6)).all() and (table[:, 0] == table[0]).all()
    for p, q, r in itertools.product(six, six, six):
        assert table[table[p, q], r] == table[p, table[q, r]]
    for p in six:  # a Latin square: every shuffle can be undone
        assert sorted(table[p].tolist()) == sorted(table[:, p].tolist()) == list(six)
    assert (table != table.T).any()


def test_running_products_are_the_cups_on_the_table(generator):
    shuffles = torch.randint(6, (50, 5), generator=generator)
    products = running_products(shuffles)
    for row, result in zip(shuffles.tolist(), products.tolist(), strict=True):
        told = [by_hand(row[: k + 1]) for k in range(5)]
        assert [ARRANGEMENTS[x] for x in result] == told


# ---- rows


def test_a_chain_row():
    task = Permutations(4, "chain", 2)
    row = task.render(task.parse("bac acb abc cba"))[0]
    expected = "[BOS] 1: bac acb 2: abc cba 1: bac bca 2: bca acb"
    assert words(task, row) == expected.split()
    assert words(task, row)[-1] == by_hand([2, 1, 0, 5])
    assert task.streams == [slice(7, 13)] and task.summary is None
    assert task.written.tolist() == [c in (8, 9, 11, 12) for c in range(13)]


def test_a_row_of_streams_and_its_columns():
    task = Permutations(6, "streams", 2)
    row = task.render(task.parse("bac acb cba cba abc bca"))[0]
    expected = "[BOS] 1: bac acb cba 2: cba abc bca 1: bca acb acb 2: cba bac cab"
    assert words(task, row) == expected.split()
    columns = range(task.length)
    assert [[*columns[stream]] for stream in task.streams] == [[10, 11], [14, 15]]
    assert [*columns[task.summary]] == [12, 16] and task.length == 17


def test_an_answer_row():
    task = Permutations(4, "answer", 2)
    row = task.render(task.parse("bac acb abc cba"))[0]
    expected = "[BOS] 1: bac acb 2: abc cba = acb"
    assert words(task, row) == expected.split()
    assert task.streams == [] and task.written.nonzero().tolist() == [[8]]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8, 12])
def test_both_formats_share_the_canvas_and_the_end_of_every_line(m, generator):
    chain, task = Permutations(24, "chain", m), Permutations(24, "streams", m)
    problems = chain.sample(64, generator)
    one, many = chain.render(problems), task.render(problems)
    assert chain.written.sum() == 24 and torch.equal(chain.written, task.written)
    assert_close(one[:, ~chain.written], many[:, ~chain.written])
    assert_close(one[:, task.summary], many[:, task.summary])
    assert len(range(task.length)[task.summary]) == m
    columns = [c for r in (*task.streams, task.summary) for c in range(49 + 2 * m)[r]]
    assert sorted(columns) == task.written.nonzero()[:, 0].tolist()


def test_a_stream_needs_the_shuffles_of_its_own_line_only(generator):
    task = Permutations(24, "streams", 4)
    problems = task.sample(64, generator)
    for line, stream in enumerate(task.streams):
        other = task.sample(64, generator)
        own = slice(6 * line, 6 * line + 6)
        other[:, own] = problems[:, own]
        assert_close(task.render(other)[:, stream], task.render(problems)[:, stream])


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_a_batch_is_solved_and_masks_only_what_is_written(task, generator):
    batch = task.batch(40, generator)
    ids, maskable = batch["input_ids"], batch["maskable"]
    assert ids.shape == maskable.shape == (40, task.length)
    assert torch.equal(maskable[0], task.written) and (maskable == maskable[0]).all()
    assert (ids[:, 0] == task.tokenizer.bos_token_id).all()
    assert task.grade(ids).all() and task.right(ids).all()
    if not task.reorder:
        problems = task.lines_of(ids)[..., 1:].flatten(1) - task.first
        last = [words(task, row)[-1] for row in ids]
        assert last == [by_hand(row) for row in problems.tolist()]


def test_reordered_lines_keep_their_headers(generator):
    task = TASKS[2]
    problems = task.sample(1, generator)
    orders = torch.tensor(list(itertools.permutations(range(3))))
    ids = task.render(problems.expand(6, -1), orders)
    plain = words(task, task.render(problems)[0])
    blocks = [plain[1 + 3 * k : 4 + 3 * k] for k in range(6)]  # problem, then work
    for row, order in zip(ids, orders.tolist(), strict=True):
        wanted = [blocks[k] for k in order] + [blocks[3 + k] for k in order]
        assert words(task, row) == ["[BOS]", *itertools.chain(*wanted)]
    assert task.right(ids).all() and torch.equal(task.order(ids), orders)
    assert len(task.order(task.batch(200, generator)["input_ids"]).unique(dim=0)) == 6
    for row, order in zip(ids, orders.tolist(), strict=True):
        end = 10 + 3 * order.index(2) + 2  # the end of line 3 holds the answer
        for column in task.written.nonzero()[:, 0].tolist():
            broken = row.clone()
            broken[column] = task.first + (broken[column] - task.first + 1) % 6
            assert task.grade(broken[None]).item() == (column != end)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_a_wrong_token_is_found(task, generator):
    problems = task.sample(30, generator)
    ids = task.render(problems)
    for column in task.written.nonzero()[:, 0].tolist():
        broken = ids.clone()
        broken[:, column] = task.first + (broken[:, column] - task.first + 1) % 6
        found = (~task.right(broken)).nonzero()
        assert found[:, 1].unique().tolist() == [column] and len(found) == 30
        if not task.reorder:
            assert task.grade(broken).all() == (column != task.length - 1)
    blank = task.prompt(problems)
    assert torch.equal(
        blank == task.tokenizer.mask_token_id, task.written.expand(30, -1)
    )
    assert not task.grade(blank).any()


def test_text_goes_both_ways(generator):
    task = Permutations(6, lines=1)
    problems = task.sample(20, generator)
    ids = task.render(problems)
    text = [" ".join(words(task, row)[2:8]) for row in ids]
    assert torch.equal(task.parse(text), problems)


# ---- problems


@pytest.mark.parametrize("p", [0.0, 0.35, 1.0])
def test_the_share_of_identities(p, generator):
    task = Permutations(24)
    shuffles = task._draw(4000, generator, p)
    share = (shuffles == 0).double().mean()
    assert abs(share - p) < 5 * (p * (1 - p) / shuffles.numel()) ** 0.5 + 1e-12
    others = torch.bincount(shuffles.flatten(), minlength=6)[1:].double()
    if p < 1:
        expected = others.sum() / 5
        assert ((others - expected).abs() < 5 * expected.sqrt()).all()


def test_training_mixes_shares_of_identities_and_idle_lines(generator):
    """Idle lines of a problem: Bin(4, q + (1 - q) p^6), over uniform p and q."""
    task, n = Permutations(24, lines=4), 20000
    shuffles = task._draw(n, generator, None)
    idle = (shuffles.view(n, 4, 6) == 0).all(2).sum(1)
    seen = torch.bincount(idle, minlength=5) / n
    grid = (torch.arange(400).double() + 0.5) / 400
    chance = grid + (1 - grid) * grid[:, None] ** 6  # [p, q]
    ways = torch.tensor([1, 4, 6, 4, 1])
    powers = [chance**j * (1 - chance) ** (4 - j) for j in range(5)]
    expected = ways * torch.stack([power.mean() for power in powers])
    assert ((seen - expected).abs() < 5 * (expected / n).sqrt()).all()
    assert abs((shuffles == 0).double().mean() - 0.75) < 0.02


def test_sides_are_decided_by_the_problem_alone_and_never_mixed(generator):
    task = Permutations(24)
    training, evaluation = (
        task.sample(3000, generator, evaluation=side) for side in (False, True)
    )
    assert not held_out(training).any() and held_out(evaluation).all()
    assert torch.equal(held_out(training.flip(0)).flip(0), held_out(training))
    batch = task.batch(2000, generator)["input_ids"]
    shown = task.lines_of(batch)[..., 1:].flatten(1) - task.first
    assert not held_out(shown).any()


def test_the_side_does_not_depend_on_the_answer(generator):
    task = Permutations(8, lines=4)
    problems = task._draw(60000, generator, 0.35)
    answer, side = task.solve(problems)[:, 0], held_out(problems)
    assert abs(side.double().mean() - 1 / HELD_OUT) < 0.004
    for value in range(6):
        share = side[answer == value].double().mean()
        assert abs(share - 1 / HELD_OUT) < 0.015, (value, share)


def test_the_frozen_set_is_held_out_solved_and_made_by_the_code(tmp_path, monkeypatch):
    n, task = 24, Permutations()
    problems = task.frozen()
    assert held_out(problems).all() and len(problems.unique(dim=0)) == 512
    assert abs((problems == 0).double().mean() - 0.35) < 0.02
    text, path = frozen_path(n).read_text(), tmp_path / "again.jsonl"
    answers = [line.rsplit('"', 2)[1] for line in text.splitlines()]
    assert answers == [by_hand(row) for row in problems.tolist()]
    monkeypatch.setattr("dlmlib.tasks.permutations.frozen_path", lambda n: path)
    write_frozen(n)
    assert path.read_text() == text


def test_the_same_seed_gives_the_same_problems():
    one, two = (
        Permutations(24).sample(50, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(one, two)


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(n=1), "n=1"),
        (dict(n=6, format="essay"), "format='essay'"),
        (dict(n=6, lines=4), "lines=4"),
        (dict(n=6, format="streams", lines=6), "lines=6"),
        (dict(n=6, lines=0), "lines=0"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Permutations(**arguments)


def test_wrong_calls_are_named(generator):
    task = TASKS[0]
    with pytest.raises(ValueError, match=r"identities=1\.5"):
        task.sample(3, generator, identities=1.5)
    with pytest.raises(ValueError, match="n=0"):
        task.sample(0, generator)
    with pytest.raises(ValueError, match=r"problems.shape=\(1, 5\)"):
        task.render(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="problems="):
        task.render(torch.full((1, 6), 6))
    with pytest.raises(ValueError, match="shape="):
        task.grade(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="word='abd'"):
        task.parse("abc abc abc abc abc abd")
    with pytest.raises(ValueError, match="6 words"):
        task.parse("abc abc")
    with pytest.raises(ValueError, match="n=6: expected one with a file"):
        task.frozen()
