"""Speculation: the same answer with fewer forwards, whatever the policies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from toys import Votes

import dlmlib as dlm
from dlmlib.tasks.toy import Joint

MASK = 10
ORDERS = ["confidence", "entropy", "margin", "left_to_right", "random"]
RULES = {
    "one": lambda: None,
    "even": lambda: dlm.Even(5),
    "threshold": lambda: dlm.Threshold(0.4),
    "entropy": lambda: dlm.EntropyBound(0.5),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    depth=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    rule=st.sampled_from(sorted(RULES)),
    block=st.sampled_from([None, 3]),
    temperature=st.sampled_from([0.0, 0.5]),
    cfg_scale=st.sampled_from([0.0, 0.7]),
    revise=st.booleans(),
    prompts=st.lists(
        st.lists(st.sampled_from([1, 2, 3, MASK]), min_size=1, max_size=4),
        min_size=1,
        max_size=3,
    ),
)
def test_the_answer_is_that_without_drafts(
    seed, depth, order, rule, block, temperature, cfg_scale, revise, prompts
):
    """Random models and prompts, every policy: equal tokens and traces, in float64."""
    model = tiny_model(seed, mask_token_id=MASK).double()
    prompts = [[4, *prompt] for prompt in prompts]

    def run(**more):
        return dlm.decode(
            model,
            prompts,
            length=5,
            block_length=block,
            propose=order,
            commit=RULES[rule](),
            revise=dlm.Remask("cap", 0.5, steps=6) if revise else None,
            temperature=temperature,
            cfg_scale=cfg_scale,
            generator=dlm.generator(seed),
            trace=True,
            **more,
        )

    plain, ahead = run(), run(reuse=dlm.Speculate(depth))
    assert torch.equal(plain.sequences, ahead.sequences)
    assert torch.equal(plain.trace.written, ahead.trace.written)
    assert torch.allclose(
        plain.trace.logprob, ahead.trace.logprob, atol=1e-6, equal_nan=True
    )
    assert ahead.forwards <= plain.forwards
    assert (ahead.tokens_per_forward >= plain.tokens_per_forward).all()


def certain() -> Joint:
    """One possible sentence: what is drafted always comes true."""
    return Joint(torch.arange(8)[None], torch.ones(1), 11, MASK)


@pytest.mark.parametrize(("depth", "forwards"), [(1, 5), (2, 4), (3, 3), (7, 2)])
def test_drafts_that_come_true_are_free(depth, forwards):
    """Eight steps: the first forward has nothing to draft from, then 1 + depth each."""
    out = dlm.decode(
        certain().denoiser(),
        torch.full((3, 8), MASK),
        reuse=dlm.Speculate(depth),
        trace=True,
    )
    assert out.trace.steps == 8
    assert out.forwards == forwards == 1 + -(-7 // (1 + depth))
    assert out.tokens_per_forward.tolist() == pytest.approx([8 / forwards] * 3)


def test_the_pace_of_the_schedule_is_drafted():
    """Two tokens a step: drafts write two at a time and come true as well."""
    blank = torch.full((1, 8), MASK)
    ahead = dlm.Speculate(3)
    out = dlm.decode(certain().denoiser(), blank, steps=4, reuse=ahead)
    plain = dlm.decode(certain().denoiser(), blank, steps=4)
    assert torch.equal(out.sequences, plain.sequences)
    assert (plain.forwards, out.forwards) == (4, 2)


def test_a_forward_is_as_wide_as_its_drafts():
    model, widths = Votes(), []
    model.register_forward_pre_hook(lambda _, given: widths.append(len(given[0])))
    dlm.decode(model, [[1, 2]] * 2, length=6, reuse=dlm.Speculate(3))
    assert widths[0] == 2 and widths[1] == 2 * 4


@pytest.mark.parametrize("depth", [0, -1, 1.5])
def test_wrong_depth_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth={depth}: expected an integer >= 1"):
        dlm.Speculate(depth)
