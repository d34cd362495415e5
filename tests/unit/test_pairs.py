"""Sums of neighbours: the chain's prompts, another rule."""

from itertools import pairwise

import pytest
import torch
from toys import gen

from dlmlib.tasks.arithmetic import Arithmetic
from dlmlib.tasks.pairs import Pairs

pairs, chain = Pairs(5), Arithmetic(operations=5, operators="+")


def test_each_token_is_the_sum_of_two_numbers_of_the_prompt():
    for row in pairs.sample(50, gen()):
        words = pairs.render(row).split()
        numbers = [int(word.lstrip("+")) for word in words[:6]]
        sums = [str((a + b) % 7) for a, b in pairwise(numbers)]
        assert words[6:] == ["=", *sums]


def test_prompts_vocabulary_and_split_are_those_of_the_chain():
    ours, theirs = (task.sample(40, gen(), "test") for task in (pairs, chain))
    assert torch.equal(ours[:, : pairs.prompt_length], theirs[:, : chain.prompt_length])
    assert pairs.tokenizer.get_vocab() == chain.tokenizer.get_vocab()
    assert pairs.length == chain.length
    assert not torch.equal(ours, theirs)


def test_the_grade_is_for_the_whole_answer():
    rows = pairs.sample(30, gen())
    assert pairs.grade(rows).all()
    for column in range(pairs.prompt_length, pairs.length):
        wrong = rows.clone()
        wrong[:, column] = pairs.zero + (wrong[:, column] - pairs.zero + 1) % 7
        assert not pairs.grade(wrong).any()


def test_shorter_problems_end_early():
    short = pairs.encode(["3 +5 +2"])
    assert pairs.render(short[0]) == "3 +5 +2 = 1 0"
    assert pairs.grade(short).all()
    with pytest.raises(ValueError, match="operations=0"):
        Pairs(0)
