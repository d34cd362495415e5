"""The graph tasks: what they draw, how they list it, and who grades it."""

from collections import Counter
from itertools import pairwise

import networkx as nx
import pytest
import torch

from dlmlib import generator
from dlmlib.tasks.bridge import (
    FROZEN_LEVELS,
    TRACES,
    Bridge,
    depth_first,
    loop_free,
    template,
)
from dlmlib.tasks.connectivity import FROZEN_DEPTHS, FROZEN_ROWS, TwoPaths
from dlmlib.tasks.dead_ends import FROZEN_LENGTHS, DeadEnds
from dlmlib.tasks.graph_problems import NAMES, Problems, held_out, shuffled
from dlmlib.tasks.star import Star

TASKS = {
    "two paths": (TwoPaths(), 4),
    "star": (Star(), 4),
    "dead ends": (DeadEnds(), 3),
    "bridge": (Bridge(), 2),
}
parametrize = pytest.mark.parametrize("task, depth", TASKS.values(), ids=TASKS)


@parametrize
def test_exactly_one_goal_is_reached_and_the_path_leads_to_it(task, depth):
    problems = task.sample(20, generator(0), depth)
    for row in range(20):
        graph = task.graph(problems, row)
        start, *_, end = [NAMES[i] for i in problems.path[row]]
        goals = [NAMES[i] for i in problems.goals[row]]
        assert [g for g in goals if nx.has_path(graph, start, g)] == [end]
        assert nx.shortest_path_length(graph, start, end) == problems.depth
        assert problems.depth == (2 * depth if task.name == "bridge" else depth)
        path = [NAMES[i] for i in problems.path[row]]
        assert all(graph.has_edge(a, b) for a, b in pairwise(path))


@parametrize
def test_both_goals_are_equally_often_right_and_first(task, depth):
    problems = task.sample(2000, generator(1), depth)
    if task.num_goals == 2:
        first = (problems.goals[:, 0] == problems.path[:, -1]).double().mean()
        assert abs(first - 0.5) < 4 * 0.5 / 2000**0.5


@parametrize
def test_labels_are_uniform(task, depth):
    starts = task.sample(4000, generator(2), depth).path[:, 0]
    counts = torch.bincount(starts, minlength=task.nodes)
    expected = 4000 / task.nodes
    assert len(counts) == task.nodes
    assert (counts - expected).abs().max() < 5 * expected**0.5


@parametrize
def test_training_and_evaluation_never_share_a_problem(task, depth):
    training = task.sample(400, generator(3), depth)
    evaluation = task.sample(400, generator(3), depth, evaluation=True)
    assert not held_out(training).any() and held_out(evaluation).all()


@parametrize
def test_the_split_ignores_how_a_problem_is_listed(task, depth):
    problems = task.sample(200, generator(4), depth)
    order = torch.randperm(problems.source.shape[1], generator=generator(5))
    listed = Problems(
        problems.source[:, order],
        problems.target[:, order],
        problems.path,
        problems.goals.flip(1),
    )
    flipped = Problems(problems.target, problems.source, problems.path, problems.goals)
    assert torch.equal(held_out(listed), held_out(problems))
    assert torch.equal(held_out(flipped), held_out(problems))


def test_one_problem_in_sixteen_is_held_out():
    task = TwoPaths()
    share = held_out(task._draw(20000, 3, generator(6))).double().mean()
    assert abs(share - 1 / 16) < 5 * (1 / 16 * 15 / 16 / 20000) ** 0.5


FROZEN = {
    "two paths": FROZEN_DEPTHS,
    "star": FROZEN_DEPTHS,
    "dead ends": FROZEN_LENGTHS,
    "bridge": FROZEN_LEVELS,
}


@pytest.mark.parametrize(
    "task, depth",
    [(TASKS[name][0], depth) for name, depths in FROZEN.items() for depth in depths],
    ids=[f"{name} {depth}" for name, depths in FROZEN.items() for depth in depths],
)
def test_frozen_sets_are_remade_exactly_and_held_out(task, depth):
    problems = task.frozen(depth)
    assert len(problems) == FROZEN_ROWS
    assert held_out(problems).all()
    fresh = task.draw_frozen(depth)
    for name in vars(problems):
        assert torch.equal(getattr(fresh, name), getattr(problems, name)), name
    assert len(set(map(tuple, task.head(problems).tolist()))) == FROZEN_ROWS


@pytest.mark.parametrize("name", ["dead ends", "bridge"])
def test_training_batches_never_pose_a_frozen_problem(name):
    task, source = TASKS[name][0], generator(27)
    for _ in range(20):
        ids = task.batch(32, source)["input_ids"]
        start = (ids[:, :, None] == torch.tensor(list(task.modes.values()))).any(2)
        width = int(start.int().argmax(1)[0])  # the mode stands before s
        bare = torch.cat([ids[:, :width], ids[:, width + 1 :]], 1)
        depth = next(d for d in FROZEN[name] if width == 3 + task.edges_in(d))
        assert not held_out(task.parse(bare, depth)).any()


@parametrize
def test_parse_undoes_render(task, depth):
    problems = task.sample(10, generator(7), depth)
    parsed = task.parse(task.render(problems), depth)
    for name in vars(problems):
        assert torch.equal(getattr(parsed, name), getattr(problems, name)), name


def test_parse_refuses_a_row_of_another_depth():
    task = TwoPaths()
    ids = task.render(task.sample(4, generator(8), 3))
    with pytest.raises(ValueError, match="depth 4"):
        task.parse(ids, 4)
    with pytest.raises(ValueError, match=r"goal 2 edges from s|depth 2"):
        task.parse(ids, 2)
    bridge = Bridge()
    problems = bridge.sample(2, generator(8), 2)
    ids = bridge.render(problems)
    with pytest.raises(ValueError, match="depth 3"):
        bridge.parse(ids, 3)
    both = torch.stack([problems.path[:, -1], problems.path[:, -2]], 1)
    ids[:, 1 + bridge.edges_in(2) :][:, :2] = bridge.first + both
    with pytest.raises(ValueError, match="one of two within reach"):
        bridge.parse(ids, 2)


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_row_holds_the_scratchpad_and_the_answer(budget):
    task = TwoPaths()
    problems = task.sample(5, generator(9), 3)
    ids, written = task.render(problems, budget), task.written(problems, budget)
    words = task.tokenizer.decode(ids[0][written[0]]).split()
    path = [NAMES[i] for i in problems.path[0]]
    assert words == [*path[1 : 1 + budget], path[-1]]
    assert task.tokenizer.decode(ids[0]).split()[-2] == "="
    hidden = task.prompt(problems, budget) == task.tokenizer.mask_token_id
    assert torch.equal(hidden, written)


def test_grades_of_right_and_wrong_rows():
    task = TwoPaths()
    problems = task.sample(6, generator(10), 4)
    ids = task.render(problems)
    assert task.grade(problems, ids).all() and task.evidence(problems, ids).all()
    other = problems.goals.sum(1) - problems.path[:, -1]
    wrong = ids.clone()
    wrong[:, -1] = task.first + other
    assert (
        not task.grade(problems, wrong).any() and task.evidence(problems, wrong).all()
    )
    bent = ids.clone()
    bent[:, -3] = task.first + other
    assert task.grade(problems, bent).all() and not task.evidence(problems, bent).any()


def test_star_grades_the_whole_path():
    task = Star()
    problems = task.sample(6, generator(11), 4)
    ids = task.render(problems)
    assert task.grade(problems, ids).all()
    for column in (-4, -3, -2):
        wrong = ids.clone()
        wrong[:, column] = task.equals
        assert not task.grade(problems, wrong).any()
    assert torch.equal(ids[:, -1], task.first + problems.goals[:, 0])
    assert not task.written(problems)[:, [-5, -1]].any()


def test_batches_have_every_depth_and_short_ones_most_often():
    task, source = TwoPaths((1, 4), 10), generator(12)
    depths = Counter(task.draw_depth(source) for _ in range(4000))
    for depth in (1, 2, 3, 4):
        expected = 4000 / depth / sum(1 / k for k in (1, 2, 3, 4))
        assert abs(depths[depth] - expected) < 5 * expected**0.5
    batch = task.batch(3, source)
    assert batch["input_ids"].shape == batch["maskable"].shape
    assert batch["input_ids"].shape[1] <= task.length


# -- dead ends


def spelled(task, ids):
    return [task.tokenizer.decode(row).replace(" [EOS]", "").split() for row in ids]


def test_a_walk_stops_at_the_first_dead_end():
    task = DeadEnds()
    problems = task.sample(3, generator(13), 3)
    turns = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    dead, path = task.dead_ends(problems).tolist(), problems.path.tolist()
    expected = [
        [*path[0][1:], "=", path[0][3]],
        [path[1][1], dead[1][1], "=", "?"],
        [dead[2][0], "=", "?"],
    ]
    rows = [[x if isinstance(x, str) else NAMES[x] for x in row] for row in expected]
    assert spelled(task, task.trace(problems, turns, "walk")) == rows


def test_a_search_steps_back_and_always_arrives():
    task = DeadEnds()
    problems = task.sample(50, generator(14), 3)
    turns = task.turns(problems, generator(15))
    for row, words in enumerate(spelled(task, task.trace(problems, turns, "search"))):
        *walk, equals, answer = words
        assert equals == "=" and answer == walk[-1] == NAMES[problems.path[row, -1]]
        assert len(walk) == 3 + 2 * int(turns[row].sum())
        graph = task.graph(problems, row).to_undirected()
        steps = [NAMES[problems.path[row, 0]], *walk]
        assert all(graph.has_edge(a, b) for a, b in pairwise(steps))


def test_a_random_walk_arrives_with_chance_two_to_the_minus_depth():
    task = DeadEnds()
    problems = task.sample(8000, generator(16), 3)
    trace = task.trace(problems, task.turns(problems, generator(17)), "walk")
    said = task.answers(trace)
    right = (said == problems.path[:, -1] + task.first).double().mean()
    assert abs(right - 1 / 8) < 5 * (1 / 8 * 7 / 8 / 8000) ** 0.5
    assert ((said == task.unknown) | (said == problems.path[:, -1] + task.first)).all()


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_batch_of_dead_ends_walks_and_searches(rows):
    task = DeadEnds()
    batch = task.batch(rows, generator(26))
    ids, written = batch["input_ids"], batch["maskable"]
    walks = (ids == task.modes["walk"]).any(1)
    assert len(ids) == rows and int(walks.sum()) == -(-rows // 4)
    assert (walks | (ids == task.modes["search"]).any(1)).all()
    assert not (ids[written] == task.tokenizer.eos_token_id).any()
    said = task.answers(ids.masked_fill(~written, task.tokenizer.eos_token_id))
    assert ((said == task.unknown) <= walks).all()


def test_an_answer_that_is_missing_counts_as_unknown():
    task = DeadEnds()
    rows = torch.tensor([[9, task.equals, 11], [9, 10, task.equals], [9, 10, 11]])
    assert task.answers(rows).tolist() == [11, task.unknown, task.unknown]


# -- the bridge graph


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_bridge_graph_has_the_sizes_of_the_paper(depth):
    graph = template(depth, 3, 5, 3)
    assert len(graph) == 10 * depth + 1 and graph.number_of_edges() == 11 * depth
    assert nx.shortest_path_length(graph, 0, 10 * depth) == 3 * depth
    degrees = [graph.degree[10 * j] for j in range(depth + 1)]
    assert degrees == [3, *[5] * (depth - 1), 2]
    assert Bridge((1, depth), 3, 5, 3).edges_in(depth) == 22 * depth


def test_depth_first_search_is_a_walk_that_turns_back_only_at_the_end_of_a_way():
    task = Bridge()
    problems = task.sample(30, generator(18), 2)
    for row, trace in enumerate(task.thoughts(problems, "search", generator(19))):
        names = task.graph(problems, row)
        steps = [NAMES[i] for i in (int(problems.path[row, 0]), *trace)]
        assert all(names.has_edge(a, b) for a, b in pairwise(steps))
        assert steps[-1] == NAMES[problems.path[row, -1]]
        assert len(steps) + 1 <= task.room(2)
        for at in range(1, len(steps) - 1):
            if steps[at + 1] in steps[:at]:  # back: nothing new was left here
                assert set(names[steps[at]]) <= set(steps[: at + 1])


def test_short_and_long_ways_are_taken_equally_often():
    task = Bridge((1, 1))
    problems = task.sample(3000, generator(20), 1)
    lengths = [len(t) for t in task.thoughts(problems, "path", generator(21))]
    assert set(lengths) == {2, 3}
    assert abs(lengths.count(2) / 3000 - 0.5) < 4 * 0.5 / 3000**0.5


@pytest.mark.parametrize("mode", ["shortest", "path"])
def test_traces_without_mistakes_never_visit_a_node_twice(mode):
    task = Bridge((1, 3))
    problems = task.sample(30, generator(28), 3)
    lengths = set()
    for row, trace in enumerate(task.thoughts(problems, mode, generator(29))):
        start, *_, goal = problems.path[row].tolist()
        assert len({start, *trace}) == 1 + len(trace) and trace[-1] == goal
        lengths.add(len(trace))
    assert lengths == {6} if mode == "shortest" else lengths <= {6, 7, 8, 9}


@pytest.mark.parametrize("rows", [1, 4, 10])
def test_a_batch_of_bridges_holds_all_traces(rows):
    task = Bridge()
    batch = task.batch(rows, generator(30))
    ids, written = batch["input_ids"], batch["maskable"]
    counts = [int((ids == task.modes[mode]).any(1).sum()) for mode in TRACES]
    assert counts == [rows // 4, rows // 4, rows - 2 * (rows // 4)]
    assert ids.shape == written.shape and ids.shape[1] <= task.length
    assert not (ids[written] == task.tokenizer.eos_token_id).any()
    last = written.cumsum(1).argmax(1, keepdim=True)  # the answer
    goals = ids[:, 1:].gather(1, last - 1 - 1)  # `=` before it
    assert (goals == task.equals).all()


def test_loop_free_drops_detours():
    assert loop_free([0, 1, 2, 1, 0, 3, 4]) == [0, 3, 4]
    assert loop_free([0, 1, 2]) == [0, 1, 2]


def test_search_returns_when_it_starts_at_the_goal():
    assert depth_first(nx.path_graph(3), 1, 1, None) == [1]


def test_bridge_judges_decision_and_evidence():
    task = Bridge()
    problems = task.sample(40, generator(22), 1)
    written = task.told(problems, task.thoughts(problems, "search", generator(23)))
    decided, proved = task.judge(problems, written)
    assert decided.all() and proved.all()
    jumped = torch.cat([written[:, :1], written[:, :1], written[:, 1:]], 1)
    decided, proved = task.judge(problems, jumped)
    assert decided.all() and not proved.any()  # a node twice in a row is no step
    nothing = torch.full_like(written, task.tokenizer.eos_token_id)
    decided, proved = task.judge(problems, nothing)
    assert not decided.any() and not proved.any()


# -- small parts and wrong inputs


def test_shuffled_keeps_every_entry_and_mixes_rows_independently():
    values = torch.arange(6).expand(5000, 6)
    mixed = shuffled(values, generator(24))
    assert torch.equal(mixed.sort(1).values, values)
    first = torch.bincount(mixed[:, 0], minlength=6)
    assert (first - 5000 / 6).abs().max() < 5 * (5000 / 6) ** 0.5


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: TwoPaths((0, 3)), "depths"),
        (lambda: TwoPaths((1, 8), 17), "nodes=17"),
        (lambda: TwoPaths(truncated=1.5), "truncated"),
        (lambda: Star((1, 3)), "depths"),
        (lambda: Bridge(short=0), "lengths"),
        (lambda: Bridge((1, 3), nodes=37), "nodes=37"),
        (lambda: Bridge().frozen(3), "depth=3"),
        (lambda: TwoPaths().sample(0, generator(0)), "n=0"),
        (lambda: TwoPaths().sample(4, generator(0), 9), "depth=9"),
        (lambda: TwoPaths().frozen(1), "depth=1"),
    ],
)
def test_wrong_inputs_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_budget_beyond_the_path_is_refused():
    task = TwoPaths()
    problems = task.sample(2, generator(25), 3)
    for budget in (-1, 4):
        with pytest.raises(ValueError, match="budget"):
            task.render(problems, budget)
    dead = DeadEnds()
    with pytest.raises(ValueError, match="mode='run'"):
        dead.prompt(dead.sample(1, generator(0), 2), "run")
    bridge = Bridge()
    problems = bridge.sample(1, generator(0), 1)
    with pytest.raises(ValueError, match="mode='maze'"):
        bridge.prompt(problems, "maze")
    with pytest.raises(ValueError, match="mode='maze'"):
        bridge.thoughts(problems, "maze", generator(0))
