"""Paths and stars by turns: both kinds, one vocabulary."""

import pytest
import torch
from toys import gen

from dlmlib.tasks.both_ways import BothWays


def test_batches_are_of_both_kinds_and_as_their_tasks_draw_them():
    task, source = BothWays(depth=3), gen()
    kinds = []
    for _ in range(40):
        batch = task.batch(4, source)
        ids, written = batch["input_ids"], batch["maskable"]
        part = task.parts[int(written[0, -1] == 0)]  # a star's end is given
        depth = (ids.shape[1] - (3 if part.name == "star" else 6)) // 3
        problems = part.parse(ids, depth)
        assert torch.equal(part.render(problems), ids)
        assert torch.equal(part.written(problems), written)
        assert ids.shape[1] <= task.length and int(ids.max()) < len(task.tokenizer)
        kinds.append(part.name)
    assert 10 < kinds.count("star") < 30


def test_one_vocabulary():
    paths, stars = BothWays().parts
    assert paths.tokenizer.get_vocab() == stars.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("arguments", "message"), [({"depth": 1}, "depth=1"), ({"nodes": 9}, "nodes=9")]
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BothWays(**arguments)
