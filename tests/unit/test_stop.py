"""Early commitment: the gap against the definition, and what closing a row means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from toys import Votes
from transformers.utils import ModelOutput

import dlmlib as dlm
from dlmlib.decoding.canvas import Canvas

MASK = 10
ANSWER = slice(-2, None)


class Fixed(torch.nn.Module):
    """The same logits [T, V] whatever the canvas says."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.mask_token_id = logits, MASK

    def forward(self, input_ids):
        rows = self.logits[None].expand(len(input_ids), -1, -1)
        return ModelOutput(logits=rows)


def leading(gaps) -> Fixed:
    """A model whose best logit leads by the given gap at each position."""
    logits = torch.full((len(gaps), 12), -5.0)
    logits[:, 3], logits[:, 4] = torch.tensor(gaps), 0.0
    return Fixed(logits)


@pytest.mark.parametrize(
    ("gap", "step"),
    [(8.0, 1), (7.5, 1), (7.4, 4), (5.0, 4), (4.9, 7), (2.5, 7), (2.4, 10)],
)
def test_thresholds_fall_with_progress(gap, step):
    """Ten steps: 7.5 needed before 3.3 steps, 5 before 6.7, then 2.5."""
    out = dlm.decode(
        leading([1.0] * 8 + [gap] * 2),
        [[MASK] * 10],
        steps=10,
        propose="left_to_right",
        stop=dlm.EarlyCommit(ANSWER),
        trace=True,
    )
    assert out.forwards == step
    assert out.trace.written[step - 1].sum() == 10 - (step - 1)
    assert (out.sequences == 3).all()


def test_the_gap_is_a_mean_over_the_answer_written_or_not():
    """Right to left, the answer's own positions are written first and still count."""
    model = leading([1.0] * 8 + [4.0, 6.0])  # mean 5: from the fourth step on
    order = {"propose": "right_to_left", "steps": 10}
    out = dlm.decode(model, [[MASK] * 10], stop=dlm.EarlyCommit(ANSWER), **order)
    assert out.forwards == 4


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    gap=st.floats(0, 3),
    temperature=st.sampled_from([0.0, 1.0]),
    block=st.sampled_from([2, 3, 8]),
    seed=st.integers(0, 99),
    masks=st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
def test_rows_close_on_their_own(gap, temperature, block, seed, masks):
    """No mask is left, given tokens stay, and greedy rows ignore their neighbours."""
    prompts = [[1, *[MASK] * count, 2] for count in masks]
    options = {
        "length": 6,
        "block_length": block,
        "steps": 8,
        "stop": dlm.EarlyCommit(ANSWER, (gap, gap / 2, gap / 4)),
        "temperature": temperature,
    }
    out = dlm.decode(Votes(), prompts, generator=dlm.generator(seed), **options)
    assert not (out.sequences == MASK).any()
    assert out.forwards <= 8
    if temperature == 0:
        for row, prompt in enumerate(prompts):
            alone = dlm.decode(Votes(), [prompt], **options).sequences[0]
            assert torch.equal(out.sequences[row, -len(alone) :], alone)


@pytest.mark.parametrize("reuse", [dlm.PrefixCache, dlm.DualCache, dlm.Speculate])
@pytest.mark.parametrize("gap", [1e9, 1.0])
def test_composes_with_what_is_reused(reuse, gap):
    """The watched columns are computed anew; rows still ignore their neighbours."""
    model = tiny_model(1, mask_token_id=MASK).double()
    prompts = [[1, 2, 3], [4, MASK], [5]]
    options = {"length": 8, "block_length": 4, "steps": 8}
    stop = dlm.EarlyCommit(ANSWER, (gap, gap / 2, gap / 4))
    out = dlm.decode(model, prompts, reuse=reuse(), stop=stop, **options)
    assert not (out.sequences == MASK).any()
    for row, prompt in enumerate(prompts):
        alone = dlm.decode(model, [prompt], reuse=reuse(), stop=stop, **options)
        width = alone.sequences.shape[1]
        assert torch.equal(out.sequences[row, -width:], alone.sequences[0])
    if reuse is dlm.Speculate:
        plain = dlm.decode(model, prompts, stop=stop, **options)
        assert torch.equal(out.sequences, plain.sequences)


def test_a_gap_that_is_never_reached_changes_nothing():
    options = {"length": 6, "steps": 6, "trace": True}
    plain = dlm.decode(Votes(), [[1, 2]], **options)
    stop = dlm.EarlyCommit(ANSWER, (1e9, 1e9, 1e9))
    watched = dlm.decode(Votes(), [[1, 2]], stop=stop, **options)
    assert torch.equal(plain.sequences, watched.sequences)
    assert torch.equal(plain.trace.written, watched.trace.written)
    assert plain.forwards == watched.forwards


def test_a_settled_row_takes_nothing_back():
    revise = dlm.Remask("cap", eta=1.0)
    out = dlm.decode(
        Votes(),
        [[1, 2]] * 4,
        length=6,
        steps=6,
        revise=revise,
        stop=dlm.EarlyCommit(ANSWER, (0.0, 0.0, 0.0)),
        generator=dlm.generator(0),
    )
    assert out.forwards == 1 and not (out.sequences == MASK).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dlm.EarlyCommit(gaps=(1, 2)), r"gaps=\(1, 2\): expected three"),
        (lambda: dlm.EarlyCommit(gaps=(1, 2, -1)), "gaps=.*>= 0"),
        (lambda: dlm.EarlyCommit(steps=0), "steps=0"),
        (
            lambda: dlm.decode(
                Votes(),
                [[1]],
                length=2,
                commit=dlm.Threshold(0.9),
                stop=dlm.EarlyCommit(),
            ),
            "stop.steps=None: expected an integer >= 1",
        ),
        (
            lambda: dlm.EarlyCommit(slice(9, 9)).columns(Canvas.start([[1]], 2, MASK)),
            r"answer=slice\(9, 9, None\): expected columns of 3",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
