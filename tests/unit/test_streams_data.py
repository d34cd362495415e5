"""Structured instances: what stands where, the control, and the masking."""

import pytest
import torch
from datasets import Dataset
from toys import Votes, gen

import dlmlib as dlm
from dlmlib.tasks.streams_data import (
    Layout,
    StructuredMasking,
    curate,
    parallel_instance,
    sequential_instance,
)

M = Votes.mask_token_id
LAYOUT = Layout(
    headers=((5, 6), (5, 7), (8,)), path_length=3, summary_length=2, filler=9
)


def test_parallel_instance_by_hand():
    row = parallel_instance([0, 1], [[2, 3, 4], [2]], [4], LAYOUT)
    assert row["input_ids"] == [0, 1, 5, 6, 2, 3, 4, 5, 7, 2, 9, 9, 8, 4, 9]
    assert row["segment"] == [-1, -1, -1, -1, 0, 0, 0, -1, -1, 1, 1, 1, -1, 2, 2]
    assert row["maskable"] == [s >= 0 for s in row["segment"]]


def test_the_control_has_the_same_tokens_and_length():
    parts = [0, 1], [[2, 3, 4], [2]], [4]
    parallel, chain = (
        parallel_instance(*parts, LAYOUT),
        sequential_instance(*parts, LAYOUT),
    )
    assert chain["input_ids"] == [0, 1, 5, 6, 2, 3, 4, 5, 7, 2, 8, 4, 9, 9, 9]
    assert sorted(chain["input_ids"]) == sorted(parallel["input_ids"])
    assert chain["maskable"] == [False] * 2 + [True] * 13


def test_shuffling_permutes_the_paths_only():
    seen = set()
    for seed in range(20):
        row = parallel_instance([0], [[2, 3], [4]], [4], LAYOUT, gen(seed))
        seen.add(tuple(row["input_ids"]))
    first = (0, 5, 6, 2, 3, 9, 5, 7, 4, 9, 9, 8, 4, 9)
    assert seen == {first, (0, 5, 6, 4, 9, 9, 5, 7, 2, 3, 9, 8, 4, 9)}


@pytest.mark.parametrize("prompt", [[0], [0, 1, 2, 3]])
def test_the_canvas_is_decoded_stream_by_stream(prompt):
    canvas = LAYOUT.canvas(prompt, M)
    row = parallel_instance(prompt, [[2, 3, 4], [2]], [4], LAYOUT)
    masked = [token == M for token in canvas]
    assert masked == row["maskable"]
    out = dlm.decode(
        Votes(), canvas, where=LAYOUT.where(), steps=4, mask_token_id=M, trace=True
    )
    segment = torch.tensor(row["segment"])
    counts = [
        [int(w[0, segment == s].sum()) for s in range(3)] for w in out.trace.written
    ]
    assert counts == [[1, 1, 0]] * 3 + [[0, 0, 2]]
    assert out.sequences[0, segment < 0].tolist() == [
        t for t, s in zip(canvas, row["segment"], strict=True) if s < 0
    ]
    together = dlm.decode(
        Votes(), canvas, where=LAYOUT.where(concurrent=True), steps=1, mask_token_id=M
    )
    assert together.forwards == 1


def test_curate_reads_any_columns():
    tokenizer = dlm.word_tokenizer(list("abcdefgh"))
    layout = Layout(((4,), (4,), (5,)), path_length=2, summary_length=1, filler=2)
    rows = {
        "question": ["a b", "c", "d"],
        "one": ["e f", "e", "e f g"],  # the last one is too long
        "two": ["g", "h", "h"],
        "answer": ["h", "g", "g"],
    }
    columns = dict(prompt="question", paths=["one", "two"], summary="answer")
    data = Dataset.from_dict(rows)
    made = curate(data, tokenizer, layout, **columns)
    first = "a b a e f a g [EOS] b h"
    assert tokenizer.decode(made[0]["input_ids"]) == first
    assert len(made) == 2
    streamed = list(
        curate(
            data.to_iterable_dataset(), tokenizer, layout, **columns, sequential=True
        )
    )
    assert tokenizer.decode(streamed[0]["input_ids"]) == "a b a e f a g b h [EOS]"
    assert len(streamed) == 2


def test_structured_masking_rates():
    row = parallel_instance([0], [[2, 3, 4], [2, 3, 3]], [4, 4], LAYOUT)
    n = 20_000
    batch = {name: torch.tensor([values] * n) for name, values in row.items()}
    noised = StructuredMasking(M).corrupt(batch, gen(0))
    hidden = noised["noisy_ids"] == M
    segment = batch["segment"][0]
    assert not hidden[:, segment < 0].any()
    share = hidden[:, (segment >= 0) & (segment < 2)].double().mean()
    assert abs(share - 0.45) < 0.01  # mean of 0.9 t
    summary = hidden[:, segment == 2]
    # t > 0.2: hidden as a whole; below, at the rate 0.9 t of the paths.
    assert abs(summary.double().mean() - (0.8 + 0.2 * 0.09)) < 0.01
    assert abs(summary.all(1).double().mean() - (0.8 + 0.81 * 0.2**3 / 3)) < 0.01
    counts = hidden.sum(1).clamp_min(1)
    assert torch.allclose(noised["weight"] * counts, torch.tensor(8.0))
    assert (noised["tokens"] == 8).all()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: parallel_instance([0], [[1]], [2], LAYOUT), "paths=1"),
        (lambda: parallel_instance([0], [[1] * 4, [1]], [2], LAYOUT), "len(ids)=4"),
        (lambda: sequential_instance([0], [[1] * 4, [1]], [2], LAYOUT), "len(ids)=4"),
        (lambda: Layout(((1,),), 1, 1, 0), "headers=((1,),)"),
        (lambda: Layout(((1,), (2,)), 0, 1, 0), "path_length=0"),
        (lambda: StructuredMasking(1, largest=0.0), "largest=0.0"),
        (lambda: StructuredMasking(1, alpha=2), "alpha=2"),
    ],
)
def test_wrong_input(call, name):
    with pytest.raises(ValueError) as error:
        call()
    assert name in str(error.value)
