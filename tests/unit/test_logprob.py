"""Estimators of the log-probability against sums over everything they could draw."""

import pytest
import torch
from tiny import random_ids, tiny_model
from toys import gen

from dlmlib.diffusion import exact_log_likelihood
from dlmlib.rl.estimators import (
    ELBO,
    EUBO,
    Coupled,
    InOrder,
    MeanField,
    OneState,
    Trajectory,
    dense_steps,
)
from dlmlib.rl.logprob import Views

MASK, LENGTH, ROWS = 12, 4, 4000
ESTIMATORS = [
    MeanField(),
    Coupled(),
    ELBO(3, 2),
    ELBO(3, count=False),
    EUBO(),
    InOrder(),
    InOrder("random"),
    Trajectory(),
    Trajectory(2),
    OneState(),
    OneState(2),
    OneState(2, together=True),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(hidden_size=16, num_hidden_layers=1, initializer_range=0.6)


@pytest.fixture(scope="module")
def word():
    return random_ids(1, LENGTH, seed=3)


def empty(rows: int) -> torch.Tensor:
    return torch.zeros(rows, 0, dtype=torch.long)


def sampled(estimator, model, word, step=None, seed=0):
    """The estimate for many independent draws [ROWS]."""
    rows = word.expand(ROWS, -1)
    if step is not None:
        step = step.expand(ROWS, -1)
    with torch.no_grad():
        found = estimator(model, empty(ROWS), rows, gen(seed), step)
    return found.total.double()


def assert_mean(draws, expected):
    """Within four standard errors, which must be small themselves."""
    error = draws.std() / len(draws) ** 0.5
    assert error < 0.25
    assert abs(draws.mean() - expected) < 4 * error + 1e-6


@pytest.mark.parametrize(
    "estimator",
    [
        ELBO(1),
        ELBO(4),
        ELBO(2, masks=3),
        ELBO(2, spread=False),
        InOrder("random"),
    ],
)
def test_mean_is_the_exact_bound(model, word, estimator):
    _, bound = exact_log_likelihood(model, word[0])
    assert_mean(sampled(estimator, model, word), bound)


def test_bernoulli_masks_miss_only_the_times_below_eps(model, word):
    _, bound = exact_log_likelihood(model, word[0])
    estimator = ELBO(8, count=False)
    assert_mean(sampled(estimator, model, word), bound * (1 - estimator.eps))


def test_more_times_lower_the_variance_and_masks_do_so_less(model, word):
    """VRPO's allocation: at equal forwards, one mask a time is best."""
    one, times, masks = (
        sampled(e, model, word).var()
        for e in (ELBO(1), ELBO(4, spread=False), ELBO(1, masks=4))
    )
    assert times < masks < one
    torch.testing.assert_close(times, one / 4, rtol=0.15, atol=0)


def test_left_to_right_is_the_chain_rule(model, word):
    expected = 0.0
    canvas = torch.full_like(word, MASK)
    for column in range(LENGTH):
        with torch.no_grad():
            log_p = model(canvas).logits[0, column].log_softmax(-1)
        expected += log_p[word[0, column]].item()
        canvas[0, column] = word[0, column]
    with torch.no_grad():
        found = InOrder()(model, empty(1), word)
    assert found.total.item() == pytest.approx(expected, abs=1e-5)
    assert found.forwards == LENGTH


def test_trajectory_follows_the_steps(model, word):
    """Steps 1, 0, 1, 2: two tokens share a forward and do not see each other."""
    step = torch.tensor([[5, 2, 5, 9]])
    expected = 0.0
    for number in (2, 5, 9):
        canvas = word.masked_fill(step >= number, MASK)
        with torch.no_grad():
            log_p = model(canvas).logits[0].log_softmax(-1)
        for column in (step[0] == number).nonzero()[:, 0]:
            expected += log_p[column, word[0, column]].item()
    with torch.no_grad():
        found = Trajectory()(model, empty(1), word, commit_step=step)
        whole = Trajectory(1)(model, empty(1), word, commit_step=step)
        blind = MeanField(0.0)(model, empty(1), word)
    assert found.total.item() == pytest.approx(expected, abs=1e-5)
    assert found.forwards == 3
    torch.testing.assert_close(whole.total, blind.total)


def test_one_state_has_the_trajectory_as_its_mean(model, word):
    step = torch.tensor([[3, 0, 3, 7]])
    with torch.no_grad():
        exact = Trajectory()(model, empty(1), word, commit_step=step).total.item()
    assert_mean(sampled(OneState(), model, word, step), exact)


def test_one_state_a_block_has_the_trajectory_as_its_mean(model, word):
    """Blocks of two: the first is finished before the second begins."""
    step = torch.tensor([[1, 0, 2, 3]])
    with torch.no_grad():
        exact = Trajectory()(model, empty(1), word, commit_step=step).total.item()
    assert_mean(sampled(OneState(2), model, word, step), exact)
    together = sampled(OneState(2, together=True), model, word, step)
    assert abs(together.mean() - exact) > 6 * together.std() / ROWS**0.5


def test_upper_bound_lies_above_the_lower_and_meets_it_without_context(model, word):
    """By Jensen term by term; equal when no token depends on another."""
    draws = ELBO(64)
    with torch.no_grad():
        views = draws.draw(empty(200), word.expand(200, -1), MASK, gen())
        lower, upper = (
            draws.evaluate(model, views),
            EUBO(times=64).evaluate(model, views),
        )
        assert (upper.total.mean() - lower.total.mean()) > 0.1
        flat = tiny_model(hidden_size=16, num_hidden_layers=1)
        flat.model.layers[0].self_attn.o_proj.weight.zero_()  # tokens see no other
        close = EUBO(times=64).evaluate(flat, views).tokens.mean(0)
        exact = flat(torch.full_like(word, MASK)).logits[0].log_softmax(-1)
    expected = exact.gather(1, word[0, :, None])[:, 0]
    torch.testing.assert_close(close, expected, rtol=0.02, atol=0.02)


def test_coupled_scores_every_token_twice(model, word):
    """Once blind and once in its half: the weights of a token sum to (1 + w) / 2."""
    views = Coupled(0.5, 0.5).draw(empty(50), word.expand(50, -1), MASK, gen())
    hidden = views.canvas == MASK
    assert (hidden[:, 0]).all()
    assert torch.equal(hidden[:, 1], ~hidden[:, 2])
    torch.testing.assert_close(views.weight.sum(1), torch.full((50, LENGTH), 1.5))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_prompts_are_never_scored_and_rows_do_not_mix(model, estimator):
    """A row with padding on its left gets what it gets alone."""
    prompt, answer = random_ids(2, 3, seed=1), random_ids(2, LENGTH, seed=2)
    step = torch.tensor([[0, 1, 2, 2], [3, 2, 1, 0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    views = estimator.draw(prompt, answer, MASK, gen(), step, mask)
    assert not views.weight[..., :3].any()
    with torch.no_grad():
        both = estimator.evaluate(model, views)
        alone = Views(
            views.target[1:, 1:], views.canvas[1:, :, 1:], views.weight[1:, :, 1:]
        )
        single = estimator.evaluate(model, alone)
    torch.testing.assert_close(both.total[1:], single.total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.tokens.sum(1), both.total)
    assert both.forwards == views.canvas.shape[1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_finite_and_the_seed_decides(model, estimator):
    prompt, answer = random_ids(2, 3, seed=1), random_ids(2, LENGTH, seed=2)
    step = torch.tensor([[0, 1, 2, 2], [3, 2, 1, 0]])
    model.zero_grad()
    found = estimator(model, prompt, answer, gen(1), step)
    found.total.sum().backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    assert norms.isfinite().all() and norms.sum() > 0
    with torch.no_grad():
        again = estimator(model, prompt, answer, gen(1), step)
    assert torch.equal(found.total.detach(), again.total)


def test_prompt_noise_hides_the_share_asked_for():
    prompt = random_ids(200, 50)
    views = MeanField(0.3).draw(prompt, random_ids(200, 2), MASK, gen())
    share = (views.canvas[:, 0, :50] == MASK).float().mean().item()
    assert abs(share - 0.3) < 4 * (0.21 / 10_000) ** 0.5


def test_steps_are_counted_without_gaps():
    dense, steps = dense_steps(torch.tensor([[7, 2, 7, 30], [0, 0, 0, 0]]))
    assert dense.tolist() == [[1, 0, 1, 2], [0, 0, 0, 0]]
    assert steps.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MeanField(1.0), "prompt_mask=1.0"),
        (lambda: Coupled(0.0, 0.5), "low, high"),
        (lambda: ELBO(0), "times=0"),
        (lambda: ELBO(1, masks=0), "masks=0"),
        (lambda: EUBO(0.5), "power=0.5"),
        (lambda: InOrder("sideways"), "order='sideways'"),
        (lambda: Trajectory(0), "segments=0"),
        (lambda: OneState(0), "block_length=0"),
        (lambda: Trajectory().draw(empty(1), random_ids(1, 2), MASK), "commit_step"),
        (lambda: MeanField().draw(empty(1), empty(1), MASK), "completion_ids"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
