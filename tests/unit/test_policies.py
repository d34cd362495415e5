"""Every policy against its equation: brute force, known counts, known laws."""

from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from toys import LETTERS, MASK, Votes, full_joint, gen, p_value

from dlmlib.decoding import (
    EntropyBound,
    Even,
    Factor,
    Scheduled,
    Threshold,
    decode,
    propose,
)
from dlmlib.decoding.commit import ranks
from dlmlib.decoding.propose import NAMED, Proposal, proposals, sample
from dlmlib.tasks.toy import Joint

# ---------------------------------------------------------------- the token draw


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_sample_draws_from_the_tempered_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    drawn = sample(logits.repeat(20_000, 1), temperature, gen(1))[:, None]
    words = torch.arange(5)[:, None]
    law = (logits.double() / temperature).softmax(-1)
    wrong = (logits.double() / (temperature * 1.15)).softmax(-1)
    assert p_value(drawn, words, law) > 1e-3
    assert p_value(drawn, words, wrong) < 1e-6


def test_sample_without_temperature_is_the_arg_max():
    logits = torch.randn(50, 7, generator=gen(2))
    assert torch.equal(sample(logits), logits.argmax(-1))
    nearly = sample(logits, 1e-6, gen(1))
    assert torch.equal(nearly, logits.argmax(-1))


def test_sample_in_parts_equals_sample_at_once(monkeypatch):
    logits = torch.randn(64, 8, generator=gen(2))
    whole = sample(logits, 1.0, gen(3))
    monkeypatch.setattr(propose, "SAMPLING_CHUNK", 40)  # five rows at a time
    assert torch.equal(sample(logits, 1.0, gen(3)), whole)


def test_gumbel_noise_is_float64(monkeypatch):
    # 1 - 2^-30 and 1 - 2^-40 are both 1 in float32, and would tie.
    u = torch.tensor([[0.5, 1 - 2**-30, 1 - 2**-40]], dtype=torch.float64)

    def fake(shape, generator, device, dtype=torch.float32):
        assert tuple(shape) == (1, 3)
        return u.to(dtype)

    monkeypatch.setattr(propose, "uniform", fake)
    assert sample(torch.zeros(1, 3), 1.0).tolist() == [2]
    # The same noise loses against a lead larger than the difference of the Gumbels.
    assert sample(torch.tensor([[0.0, 8.0, 0.0]]), 1.0).tolist() == [1]
    assert sample(torch.tensor([[0.0, 6.0, 0.0]]), 1.0).tolist() == [2]


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([0.0, -torch.inf, 0.0]).repeat(5000, 1)
    assert set(sample(logits, 3.0, gen(1)).tolist()) == {0, 2}


# ---------------------------------------------------------------- order policies


def scored(name, logits, columns=None, **options):
    columns = torch.arange(len(logits)) if columns is None else columns
    options = dict(mask_token_id=99) | options
    return proposals(NAMED[name](), logits, columns, **options)


def test_scores_by_their_equations():
    logits = 2 * torch.randn(30, 6, generator=gen(4)).double()
    p = logits.softmax(-1)
    best = p.sort(-1, descending=True).values
    expected = {
        "confidence": best[:, 0].log(),
        "margin": best[:, 0] - best[:, 1],
        "entropy": (p * p.log()).sum(-1),
        "left_to_right": -torch.arange(30).double(),
        "right_to_left": torch.arange(30).double(),
    }
    for name, score in expected.items():
        found = scored(name, logits)
        torch.testing.assert_close(found.score, score)
        assert torch.equal(found.token, p.argmax(-1))
        torch.testing.assert_close(found.logprob, best[:, 0].log())


def test_orders_differ():
    # Sure of two, sure of one against many, and an even pair: three different rankings.
    p = torch.tensor([[0.55, 0.45, 0, 0, 0, 0], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    best = {n: int(scored(n, p.log()).score.argmax()) for n in ("confidence", "margin")}
    assert best == {"confidence": 0, "margin": 1}
    assert int(scored("entropy", p.log()).score.argmax()) == 0


def test_random_ranks_are_uniform():
    logits = torch.zeros(3, 4)
    generator = gen(6)
    orders = torch.stack(
        [
            scored("random", logits, generator=generator).score.argsort()
            for _ in range(3000)
        ]
    )
    words = torch.tensor(
        [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    )
    assert p_value(orders, words, torch.full((6,), 1 / 6)) > 1e-3


def test_clean_log_probability_whatever_the_temperature():
    logits = torch.randn(40, 5, generator=gen(8)).double()
    found = scored("confidence", logits, temperature=3.0, generator=gen(9))
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(
        found.logprob, log_p.gather(1, found.token[:, None])[:, 0]
    )
    assert not torch.equal(found.token, logits.argmax(-1))


def test_mask_is_excluded_but_counts_in_the_log_probability():
    logits = torch.tensor([[1.0, 2.0, 5.0]])
    found = scored("confidence", logits, mask_token_id=2)
    assert found.token.tolist() == [1]
    assert float(found.logprob) == pytest.approx(float(logits.log_softmax(-1)[0, 1]))


def test_entropy_of_certain_positions_is_zero():
    logits = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    found = scored("confidence", logits, with_entropy=True)
    assert found.entropy.tolist() == pytest.approx([0.0, 0.6931472])
    assert scored("confidence", logits).entropy is None


def test_ranks_are_stable():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert ranks(score).tolist() == [[3, 0, 1, 2], [0, 1, 2, 3]]


# ---------------------------------------------------------------- schedules


def counts(length, commit, **options) -> list[int]:
    """Tokens written at each paid step."""
    out = decode(
        Votes(longest=64), [1], length=length, commit=commit, trace=True, **options
    )
    assert out.forwards == out.trace.steps
    return out.trace.written[:, 0].sum(1).tolist()


def num_transfer_tokens(masked: int, steps: int) -> list[int]:
    """LLaDA: an even share at every step, one more at the first `masked % steps`."""
    return [masked // steps + (i < masked % steps) for i in range(steps)]


def test_even_spreads_the_remainder_first():
    assert counts(16, Even(6)) == [3, 3, 3, 3, 2, 2]
    for n in (1, 2, 7, 16, 33):
        for steps in (1, 2, 3, 5, 8, 16, 40):
            expected = [k for k in num_transfer_tokens(n, steps) if k]
            assert counts(n, Even(steps)) == expected, (n, steps)


def grid_counts(n: int, steps: int, eps: float = 1e-3) -> list[int]:
    """Dream: int(masks left x (1 - s/t)) on linspace(1, eps, steps + 1)."""
    t = torch.linspace(1, eps, steps + 1, dtype=torch.float64).tolist()
    written = []
    for i in range(steps):
        last = i == steps - 1
        left = n - sum(written)
        written.append(left if last else int(left * (1 - t[i + 1] / t[i])))
    return written


def test_scheduled_follows_the_grid_and_pays_for_no_empty_step():
    assert grid_counts(16, 16) == [0, *[1] * 14, 2]
    assert counts(16, Scheduled(16)) == [1] * 14 + [2]  # forwards: 15
    for n in (1, 5, 16, 30):
        for steps, eps in ((1, 1e-3), (4, 1e-3), (7, 0.27), (16, 1e-3), (40, 0.1)):
            expected = [k for k in grid_counts(n, steps, eps) if k]
            assert counts(n, Scheduled(steps, eps)) == expected, (n, steps, eps)


def test_scheduled_shares_its_steps_with_the_blocks():
    shared = [k for n, s in ((8, 3), (8, 3), (4, 2)) for k in grid_counts(n, s) if k]
    assert counts(20, Scheduled(8), block_length=8) == shared


def test_stochastic_schedule_is_ancestral_sampling():
    # After step i each of n tokens is still hidden with chance t_{i+1}, independently.
    n, steps, rows, eps = 12, 5, 6000, 1e-3
    prompts = torch.zeros(rows, 1, dtype=torch.long)
    out = decode(
        Votes(),
        prompts,
        length=n,
        commit=Scheduled(steps, eps, stochastic=True),
        propose="random",
        generator=gen(11),
        trace=True,
    )
    assert out.forwards == out.trace.steps == steps
    grid = torch.linspace(1, eps, steps + 1)
    for i in range(1, steps):
        hidden = out.trace.canvas(i)[:, 1:] == 10
        left, t = hidden.sum(1).double(), float(grid[i])
        assert float(left.mean()) == pytest.approx(n * t, abs=4 * (n * t / rows) ** 0.5)
        law = torch.tensor(stats.binom.pmf(range(n + 1), n, t))
        assert p_value(left[:, None], torch.arange(n + 1)[:, None], law) > 1e-3
        even = torch.tensor(stats.binom.pmf(range(n + 1), n, t**1.2))
        assert p_value(left[:, None], torch.arange(n + 1)[:, None], even) < 1e-6
        # and which ones are hidden does not depend on the place
        places = hidden.double().mean(0)
        assert float((places - t).abs().max()) < 4.5 * (t * (1 - t) / rows) ** 0.5
    assert not bool((out.sequences == 10).any())


# ---------------------------------------------------------------- adaptive rules


def one_row(p: torch.Tensor) -> tuple[Proposal, torch.Tensor]:
    """A proposal from marginals [n, V], ranked by confidence, all open."""
    found = scored("confidence", p.log(), with_entropy=True)
    open_ = torch.ones(1, len(p), dtype=torch.bool)
    return found.spread(open_), open_


ONE = torch.ones(1, dtype=torch.long)
marginals = st.builds(
    lambda seed, n, sharp: (
        sharp * torch.randn(n, 4, generator=gen(seed)).double()
    ).softmax(-1),
    st.integers(0, 10_000),
    st.integers(1, 7),
    st.sampled_from([0.5, 2.0, 5.0, 9.0]),
)


def chosen(keep: torch.Tensor) -> set[int]:
    return set(keep[0].nonzero()[:, 0].tolist())


@settings(max_examples=60)
@given(p=marginals, tau=st.sampled_from([0.3, 0.6, 0.9, 0.99, 1.0]))
def test_threshold_keeps_the_sure_and_the_best(p, tau):
    best = p.max(-1).values
    expected = {i for i, c in enumerate(best.tolist()) if c >= tau}
    assert chosen(Threshold(tau)(*one_row(p), ONE)) == expected | {int(best.argmax())}


@settings(max_examples=60)
@given(p=marginals, factor=st.sampled_from([0.2, 0.5, 1.0, 1.7]))
def test_factor_equals_brute_force(p, factor):
    best, index = p.max(-1).values.sort(descending=True)
    passing = [n for n in range(1, len(p) + 1) if (n + 1) * (1 - best[n - 1]) < factor]
    expected = set(index[: max(passing, default=1)].tolist())
    assert chosen(Factor(factor)(*one_row(p), ONE)) == expected


@settings(max_examples=60)
@given(p=marginals, bound=st.sampled_from([0.0, 0.05, 0.3, 1.0, 4.0]))
def test_entropy_bound_equals_brute_force(p, bound):
    h = torch.special.entr(p).sum(-1)
    fits = [
        (len(u), -float(h[list(u)].sum()), set(u))
        for k in range(1, len(p) + 1)
        for u in combinations(range(len(p)), k)
        if float(h[list(u)].sum() - h[list(u)].max()) <= bound
    ]
    size, _, expected = max(fits, key=lambda fit: fit[:2])
    proposal, open_ = one_row(p)
    proposal.score = -proposal.entropy  # the order of the paper
    keep = chosen(EntropyBound(bound)(proposal, open_, ONE))
    assert len(keep) == size and keep == expected


def test_entropy_bound_limits_what_one_step_costs():
    # KL(p || product of marginals) of the set written at once is at most the bound.
    for seed in range(30):
        joint = full_joint(seed, length=3, spread=2.5)
        p = joint.conditionals(torch.full((1, 3), MASK))[0]
        h = torch.special.entr(p).sum(-1)
        bound = 0.8
        start = torch.full((1, 3), MASK)
        options = dict(propose="entropy", commit=EntropyBound(bound), trace=True)
        out = decode(joint.denoiser(), start, **options)
        first = out.trace.written[0, 0].nonzero()[:, 0].tolist()
        table = joint.probabilities.reshape(LETTERS, LETTERS, LETTERS)
        rest = [i for i in range(3) if i not in first]
        together = table.sum(rest) if rest else table
        total = float(h[first].sum() - torch.special.entr(together).sum())
        assert -1e-9 <= total <= bound + 1e-9


def test_adaptive_rules_hold_in_every_order():
    p = torch.tensor([[0.6, 0.4, 0, 0, 0], [0.7, 0.1, 0.1, 0.05, 0.05]]).double()
    # Entropies 0.67 and 1.0: the second is more probable, but would cost 0.67 nats.
    assert chosen(EntropyBound(0.1)(*one_row(p), ONE)) == {0}
    sure = torch.tensor([[0.4, 0.3, 0.3], [0.99, 0.01, 0.0]]).double()
    proposal, open_ = one_row(sure)
    proposal.score = torch.tensor([[1.0, 0.0]]).double()  # left to right
    assert chosen(Factor(1.0)(proposal, open_, ONE)) == {1}


def test_adaptive_rules_leave_closed_positions():
    open_ = torch.tensor([[True, False, True]])
    p = torch.tensor([[0.95, 0.05], [0.97, 0.03]])
    proposal = scored("confidence", p.log(), with_entropy=True).spread(open_)
    for commit in (Threshold(0.1), Factor(50.0), EntropyBound(9.0)):
        assert chosen(commit(proposal, open_, ONE)) == {0, 2}


# ---------------------------------------------------------------- the guarantee


def peaked_joint(seed: int, length: int, share: float):
    """A joint with most of its mass near one word, the rest spread at random."""
    joint = full_joint(seed, length)
    centre = joint.sequences[seed % len(joint.sequences)]
    wrong = (joint.sequences != centre).sum(1)
    joint.probabilities = joint.probabilities * share**wrong
    joint.probabilities /= joint.probabilities.sum()
    return joint


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(2, 4),
    share=st.sampled_from([0.02, 0.05, 0.1, 0.2, 0.3]),
)
def test_sure_marginals_make_the_joint_arg_max(seed, length, share):
    # Theorem 1 of Fast-dLLM: p_i > 1 - eps for all i and (n + 1) eps <= 1.
    joint = peaked_joint(seed, length, share)
    p = joint.conditionals(torch.full((1, length), MASK))[0]
    eps = float(1 - p.max(-1).values.min())
    assume((length + 1) * eps < 1)
    together = p.argmax(-1)
    best = joint.sequences[joint.probabilities.argmax()]
    assert torch.equal(together, best)
    start = torch.full((1, length), MASK)
    out = decode(joint.denoiser(), start, commit=Factor(1.0))
    assert out.forwards == 1 and torch.equal(out.sequences[0], best)


def test_factor_one_never_breaks_a_joint_arg_max():
    # Whatever it writes at once is the arg max of these positions' joint.
    several = 0
    for seed in range(120):
        joint = peaked_joint(seed, 4, (0.05, 0.2, 0.35)[seed % 3])
        start = torch.full((1, 4), MASK)
        out = decode(joint.denoiser(), start, commit=Factor(1.0), trace=True)
        for step in range(out.trace.steps):
            before = out.trace.canvas(step)[0]
            wrote = out.trace.written[step, 0].nonzero()[:, 0].tolist()
            if len(wrote) == 1:
                continue
            several += 1
            known = before != MASK
            agrees = (joint.sequences[:, known] == before[known]).all(-1)
            weight = {}
            for word, p in zip(
                joint.sequences[agrees], joint.probabilities[agrees], strict=True
            ):
                key = tuple(word[wrote].tolist())
                weight[key] = weight.get(key, 0.0) + float(p)
            written = tuple(out.trace.proposed[step, 0, wrote].tolist())
            assert written == max(weight, key=weight.get)
    assert several > 40


def test_without_the_condition_the_guarantee_fails():
    # Two positions at 0.6 each, yet their joint arg max is another pair.
    words = torch.tensor([[0, 0], [0, 1], [1, 0]])
    joint = Joint(words, torch.tensor([0.2, 0.4, 0.4]), 4, MASK)
    start = torch.full((1, 2), MASK)
    careless = decode(joint.denoiser(), start, commit=Threshold(0.55))
    careful = decode(joint.denoiser(), start, commit=Factor(1.0))
    assert careless.sequences.tolist() == [[0, 0]] and careless.forwards == 1
    assert careful.sequences.tolist() == [[0, 1]] and careful.forwards == 2
