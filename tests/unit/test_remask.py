"""Remask: ReMDM's chances, its schedule, its limits, and what it mends."""

from itertools import product

import pytest
import torch
from toys import LETTERS, MASK, Votes, full_joint, gen, p_value, strings

from dlmlib.decoding import Even, Remask, Scheduled, Threshold, decode
from dlmlib.decoding.canvas import Canvas
from dlmlib.decoding.revise import RULES
from dlmlib.tasks.toy import Joint

ROWS, PLACES = 10_000, 8


def canvas_at(step: int, written: int, rows: int = ROWS) -> Canvas:
    """Rows with `written` of PLACES decided, and confidences 0.1, 0.2, … for them."""
    canvas = Canvas.start(torch.zeros(rows, 2, dtype=torch.long), PLACES, MASK)
    canvas.ids[:, 2 : 2 + written] = 1
    sure = torch.arange(1, written + 1) / 10
    canvas.logprob[:, 2 : 2 + written] = sure.log()
    canvas.phase_step += step
    return canvas


def frequency(revise: Remask, step: int, written: int, budget: int):
    """How often each written place is taken back, and whether the schedule stands."""
    canvas = canvas_at(step, written)
    decided = ~canvas.fixed & ~canvas.masked
    total = torch.full((ROWS,), budget)
    back, held = revise(canvas, decided, total, gen(step))
    assert not bool((back & ~decided).any()), "prompt or mask taken back"
    return back[:, 2 : 2 + written].double().mean(0), held


def sigma_max(step: int, budget: int) -> float:
    """min(1, (1 - alpha_s) / alpha_t) with alpha = share of the steps done."""
    alpha_t, alpha_s = step / budget, (step + 1) / budget
    return min(1.0, (1 - alpha_s) / alpha_t)


def close(found: torch.Tensor, chance) -> bool:
    """Within 4.5 standard errors of the chance."""
    chance = torch.as_tensor(chance, dtype=torch.float64).expand(found.shape)
    error = 4.5 * (chance * (1 - chance) / ROWS).sqrt() + 1e-12
    return bool(((found - chance).abs() <= error).all())


@pytest.mark.parametrize("step", [1, 2, 4, 6, 7])
def test_chances_are_those_of_remdm(step):
    largest = sigma_max(step, 8)
    confidence = torch.arange(1, step + 1).double() / 10
    expected = {
        ("cap", 0.15): min(0.15, largest),
        ("cap", 1.0): largest,
        ("rescale", 0.6): 0.6 * largest,
        ("conf", 0.02): largest * (-confidence).softmax(0),
    }
    for (rule, eta), chance in expected.items():
        found, held = frequency(Remask(rule, eta), step, step, budget=8)
        assert close(found, chance), (rule, found, chance)
        assert not bool(held.any())


def test_loop_holds_the_schedule_and_then_lets_go():
    loop = Remask("loop", eta=0.3, alpha_on=0.5, rounds=2)
    for step, holds in ((1, False), (3, False), (4, True), (6, True)):
        found, held = frequency(loop, step, step, budget=8)
        assert bool(held.all()) == holds and bool(held.any()) == holds
        # alpha_s = alpha_t inside the loop
        largest = min(1.0, (1 - step / 8) / (step / 8))
        assert close(found, min(0.3, largest) if holds else 0.0)
    canvas = canvas_at(4, 4)
    canvas.held += 2
    decided = ~canvas.fixed & ~canvas.masked
    back, held = loop(canvas, decided, torch.full((ROWS,), 8), gen())
    assert not bool(held.any()) and not bool(back.any())


@pytest.mark.parametrize("rule", ["cap", "rescale", "conf"])
def test_nothing_is_taken_back_at_the_ends(rule):
    for step, written in ((0, 0), (7, 7), (8, 7), (12, 7)):
        revise = Remask(rule, eta=1.0)
        canvas = canvas_at(step, written)
        decided = ~canvas.fixed & ~canvas.masked
        back, _ = revise(canvas, decided, torch.full((ROWS,), 8), gen())
        assert not bool(back.any()), (step, written)


def remasked(revise, rows=3000, length=16, steps=16, **options):
    options = dict(commit=Even(steps), propose="random") | options
    start = torch.zeros(rows, 1, dtype=torch.long)
    draw = dict(generator=gen(5), temperature=1.0, trace=True)
    return decode(Votes(), start, length=length, revise=revise, **draw, **options)


@pytest.mark.parametrize(
    "revise", [Remask("cap", 0.05), Remask("rescale", 0.1), Remask("cap", 0.0)]
)
def test_masks_left_follow_the_schedule(revise):
    trace = remasked(revise).trace
    assert trace.steps == 16
    erased = 0
    for step in range(17):
        left = (trace.canvas(step)[:, 1:] == 10).sum(1).double().mean()
        # More than scheduled may be taken back only in the last steps, and rarely.
        assert 16 - step <= float(left) <= (16 - step) * 1.02 + 0.3
        erased += int(trace.erased[step - 1].sum()) if step else 0
    assert (erased > 0) == (revise.eta > 0)


def test_writes_per_step_match_the_reverse_process():
    # n (1 - alpha_t) masks, each revealed with (alpha_s - (1 - sigma) alpha_t) /
    # (1 - alpha_t): the schedule's share and as many as were taken back.
    trace = remasked(Remask("cap", 0.05)).trace
    for step in range(1, 12):
        alpha_t, alpha_s = step / 16, (step + 1) / 16
        reveal = (alpha_s - (1 - 0.05) * alpha_t) / (1 - alpha_t)
        mean = float(trace.written[step, :, 1:].sum(1).double().mean())
        assert mean == pytest.approx(16 * (1 - alpha_t) * reveal, abs=0.08)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", [None, 5])
def test_the_prompt_and_other_blocks_are_never_erased(rule, block):
    prompts = [[1, 10, 2], [10, 3], [4, 5, 6]]
    erasures = 0
    for seed, commit in product(range(5), (Even(10), Scheduled(10), Threshold(0.4))):
        revise = Remask(rule, 0.9, steps=6, alpha_on=0.3, rounds=3)
        out = decode(
            Votes(seed),
            prompts,
            length=10,
            block_length=block,
            commit=commit,
            revise=revise,
            temperature=1.0,
            generator=gen(seed),
            trace=True,
        )
        trace = out.trace
        given = (trace.start != 10) | ~trace.valid
        assert not bool((trace.erased & given).any())
        assert not bool((trace.erased & trace.written).any())
        assert not bool(trace.erased[-1].any())
        assert not bool(((out.sequences == 10) & trace.valid).any())
        erasures += int(trace.erased.sum())
        if block:
            for step, row, column in trace.erased.nonzero().tolist():
                number = max(0, column - 3) // block
                active = trace.canvas(step)[row] == 10
                first = int(active.nonzero()[0])
                assert number == max(0, first - 3) // block
    assert erasures > 20


def test_loop_takes_its_rounds_as_extra_steps():
    plain = decode(Votes(), [1], length=20, steps=10).forwards
    for rounds in (0, 1, 4, 9):
        revise = Remask("loop", eta=1.0, alpha_on=0.5, rounds=rounds)
        out = decode(
            Votes(),
            [1],
            length=20,
            steps=10,
            revise=revise,
            generator=gen(),
            trace=True,
        )
        assert out.forwards == plain + rounds
        erased = out.trace.erased[:, 0].any(1).nonzero()[:, 0].tolist()
        assert erased == list(range(5, 5 + rounds))


def test_loop_runs_with_few_steps_too():
    revise = Remask("loop", eta=1.0, alpha_on=0.9, rounds=4)
    options = dict(length=20, steps=5, generator=gen(), trace=True)
    out = decode(Votes(), [1], revise=revise, **options)
    assert bool(out.trace.erased.any())


def test_a_round_that_takes_nothing_back_is_free():
    revise = Remask("loop", eta=0.0, alpha_on=0.5, rounds=50)
    assert decode(Votes(), [1], length=8, steps=4, revise=revise).forwards == 4


def test_with_an_adaptive_commit_it_stops_at_its_own_steps():
    out = decode(
        Votes(),
        [1],
        length=12,
        commit=Threshold(1.0),
        revise=Remask("cap", eta=1.0, steps=6),
        generator=gen(),
        trace=True,
    )
    assert bool(out.trace.erased[:5].any()) and not bool(out.trace.erased[5:].any())
    assert not bool((out.sequences == 10).any())


# ---------------------------------------------------------------- the law it samples


def remask_law(joint: Joint) -> torch.Tensor:
    """Three tokens in three steps at full strength, worked out by hand.

    Step 0 writes one at random, i. Step 1 may take back everything (sigma_max = 1): it
    writes j and k at once given i, and erases i. Step 2 writes i anew.
    """
    p = joint.probabilities.reshape(LETTERS, LETTERS, LETTERS)
    law = torch.zeros_like(p)
    for i in range(3):
        q = p.movedim(i, 0)  # [i, j, k]
        first = q.sum((1, 2))
        second = q.sum(2) / first[:, None]
        third = q.sum(1) / first[:, None]
        pair = torch.einsum("i,ij,ik->jk", first, second, third)
        again = q / q.sum(0)
        law += (pair * again).movedim(0, i) / 3
    return law.flatten()


def test_remasking_is_a_parallel_commit_and_changes_the_law():
    # As many are written in addition as are taken back: even at one token a step the
    # exact conditionals no longer give the joint, but a law that is known.
    joint = full_joint(1, length=3)
    law = remask_law(joint)
    assert float(law.sum()) == pytest.approx(1)
    samples = decode(
        joint.denoiser(),
        torch.full((ROWS, 3), MASK),
        steps=3,
        propose="random",
        revise=Remask("cap", eta=1.0),
        temperature=1.0,
        generator=gen(2),
    ).sequences
    assert p_value(samples, joint.sequences, law) > 1e-3
    assert p_value(samples, joint.sequences, joint.probabilities) < 1e-6


def test_remasking_keeps_an_independent_joint():
    # Where parallel commits are free, so is taking back by a rule blind to the tokens.
    p = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]).double()
    words = strings(3)
    joint = Joint(words, p[torch.arange(3), words].prod(-1), LETTERS + 1, MASK)
    for rule in ("cap", "rescale", "loop"):
        revise = Remask(rule, eta=0.8, alpha_on=0.5, rounds=2)
        out = decode(
            joint.denoiser(),
            torch.full((ROWS, 3), MASK),
            steps=3,
            propose="random",
            revise=revise,
            temperature=1.0,
            generator=gen(4),
        )
        assert p_value(out.sequences, words, joint.probabilities) > 1e-3


def test_without_strength_the_joint_is_exact():
    joint = full_joint(1, length=3)
    out = decode(
        joint.denoiser(),
        torch.full((ROWS, 3), MASK),
        steps=3,
        propose="random",
        revise=Remask("rescale", eta=0.0),
        temperature=1.0,
        generator=gen(3),
    )
    assert p_value(out.sequences, joint.sequences, joint.probabilities) > 1e-3


def test_one_back_one_forth_keeps_the_joint():
    # One place open: a round writes it given all the others and takes back others.
    # With two places that is a Gibbs step, which leaves the joint as it is.
    joint = full_joint(8, length=2, spread=2.0)
    out = decode(
        joint.denoiser(),
        torch.full((ROWS, 2), MASK),
        steps=2,
        propose="random",
        revise=Remask("loop", eta=1.0, alpha_on=0.5, rounds=5),
        temperature=1.0,
        generator=gen(6),
        trace=True,
    )
    assert out.forwards == 7 and int(out.trace.erased.sum()) == 5 * ROWS
    assert p_value(out.sequences, joint.sequences, joint.probabilities) > 1e-3
    marginals = joint.conditionals(torch.full((1, 2), MASK))[0]
    product_law = marginals[torch.arange(2), joint.sequences].prod(-1)
    assert p_value(out.sequences, joint.sequences, product_law) < 1e-6


# ---------------------------------------------------------------- what it mends


def consensus(length: int, pull: float) -> Joint:
    """Two letters that like to agree: p proportional to exp(pull x agreeing pairs)."""
    words = strings(length, letters=2)
    ones = words.sum(1)
    pairs = ones * (ones - 1) / 2 + (length - ones) * (length - ones - 1) / 2
    return Joint(words, (pull * pairs).exp(), 3, mask_token_id=2)


def agreement(joint: Joint, revise) -> tuple[float, int]:
    """Share of rows that are all one letter after four parallel steps, and the cost."""
    out = decode(
        joint.denoiser(),
        torch.full((3000, joint.length), joint.mask_token_id),
        steps=4,
        propose="random",
        revise=revise,
        temperature=1.0,
        generator=gen(1),
    )
    agree = (out.sequences == out.sequences[:, :1]).all(1)
    return float(agree.double().mean()), out.forwards


def test_remasking_mends_what_parallel_commits_broke():
    joint = consensus(length=6, pull=1.2)
    truth = float(joint.probabilities[0] + joint.probabilities[-1])
    plain, cost = agreement(joint, None)
    assert truth > 0.95 and plain < 0.6 and cost == 4
    for revise in (Remask("cap", 0.5), Remask("rescale", 0.5), Remask("conf")):
        mended, same = agreement(joint, revise)
        assert same == cost and mended > plain + 0.05  # standard error: 0.009
    looped, more = agreement(joint, Remask("loop", 0.3, alpha_on=0.5, rounds=8))
    assert more == cost + 8 and looped > 0.9
