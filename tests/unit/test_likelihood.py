"""Exact and Monte Carlo log-likelihood, against a walk through every order."""

import math
from itertools import permutations
from statistics import mean, stdev

import pytest
import torch
from tiny import random_ids, tiny_model
from torch import nn
from transformers.utils import ModelOutput

from dlmlib.diffusion import exact_log_likelihood, log_likelihood
from dlmlib.diffusion.objective import TIMES
from dlmlib.tasks.toy import Joint

MASK = 5


def small_model(seed=0):
    return tiny_model(
        seed,
        vocab_size=MASK + 1,
        mask_token_id=MASK,
        hidden_size=16,
        num_hidden_layers=1,
        initializer_range=0.6,
    )


class Spy(nn.Module):
    """Passes calls on and remembers every canvas it saw."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, input_ids):
        self.seen.append(input_ids.clone())
        return self.model(input_ids)


@torch.no_grad()
def over_all_orders(model, word) -> tuple[float, float]:
    """log of the mean probability over all L! orders, and the mean log-probability."""
    totals = []
    for order in permutations(range(len(word))):
        canvas, total = torch.full_like(word, MASK), 0.0
        for column in order:
            log_p = model(canvas[None]).logits[0, column].double().log_softmax(-1)
            total += log_p[word[column]].item()
            canvas[column] = word[column]
        totals.append(total)
    totals = torch.tensor(totals, dtype=torch.float64)
    return (totals.logsumexp(0) - math.log(len(totals))).item(), totals.mean().item()


# Exact


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_enumeration_equals_all_orders(seed, length):
    model, word = small_model(seed), random_ids(1, length, seed, MASK)[0]
    ours = exact_log_likelihood(model, word)
    theirs = over_all_orders(model, word)
    assert ours == pytest.approx(theirs, rel=1e-5)
    if length == 1:  # one order only: no gap
        assert ours[0] == pytest.approx(ours[1], rel=1e-12)
    else:
        assert ours[1] < ours[0] - 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_sum_to_one(seed):
    """f is a distribution over words when [MASK] itself is impossible."""
    model = tiny_model(seed, vocab_size=4, mask_token_id=3, hidden_size=8)

    def no_mask(input_ids):
        logits = model(input_ids).logits
        return ModelOutput(logits=logits.index_fill(-1, torch.tensor(3), -math.inf))

    words = torch.cartesian_prod(*[torch.arange(3)] * 3)
    total = sum(math.exp(exact_log_likelihood(no_mask, word, 3)[0]) for word in words)
    assert total == pytest.approx(1.0, abs=1e-5)


def test_exact_model_has_its_own_likelihood():
    joint, tokenizer = Joint.of_words({"CLAUD": 3, "LLADA": 1})
    for word, chance in zip(joint.sequences, (0.75, 0.25), strict=True):
        both = exact_log_likelihood(joint.denoiser(), word, tokenizer.mask_token_id)
        assert both == pytest.approx((math.log(chance), math.log(chance)), abs=1e-6)


def test_what_cannot_be_written_has_no_likelihood():
    """A word outside the support: probability 0, an infinite bound, no nan."""
    joint = Joint(torch.tensor([[0, 0], [1, 1]]), torch.ones(2), 3, mask_token_id=2)
    likelihood, bound = exact_log_likelihood(joint.denoiser(), torch.tensor([0, 1]))
    assert likelihood == bound == -math.inf


# Monte Carlo


@pytest.mark.parametrize("times", TIMES)
def test_converges_to_the_bound(times):
    """Fifty estimates average to the enumerated bound, within 4 standard errors."""
    model, word = small_model(), random_ids(1, 4, 3, MASK)[0]
    generator = torch.Generator().manual_seed(0)
    empty = word[:0]
    drawn = [
        log_likelihood(model, empty, word, 256, 256, times=times, generator=generator)
        for _ in range(50)
    ]
    _, bound = exact_log_likelihood(model, word)
    error = stdev(drawn) / 50**0.5
    assert error < 0.02 * abs(bound)
    missed = 0.0 if times == "l_of_L" else 2e-3 * abs(bound)  # the times below eps
    assert abs(mean(drawn) - bound) < 4 * error + missed


def test_bound_given_a_prompt():
    """With a prompt it is the bound of the answer alone, seen after the prompt."""
    model = small_model()
    prompt, answer = random_ids(1, 3, 1, MASK)[0], random_ids(1, 3, 2, MASK)[0]

    def after_prompt(input_ids):
        whole = torch.cat([prompt.expand(len(input_ids), -1), input_ids], dim=1)
        return ModelOutput(logits=model(whole).logits[:, len(prompt) :])

    _, bound = exact_log_likelihood(after_prompt, answer, MASK)
    generator = torch.Generator().manual_seed(1)
    drawn = [
        log_likelihood(model, prompt, answer, 240, 240, generator=generator)
        for _ in range(40)
    ]
    assert abs(mean(drawn) - bound) < 4 * stdev(drawn) / 40**0.5
    _, unconditional = exact_log_likelihood(model, answer)
    assert abs(unconditional - bound) > 0.05  # the prompt is read


def test_one_token_needs_one_sample():
    model, prompt = small_model(), random_ids(1, 4, 1, MASK)[0]
    for token in range(MASK):
        value = log_likelihood(model, prompt, torch.tensor([token]), samples=1)
        canvas = torch.cat([prompt, torch.tensor([MASK])])
        with torch.no_grad():
            log_p = model(canvas[None]).logits[0, -1].log_softmax(-1)
        assert value == pytest.approx(log_p[token].item(), rel=1e-5)


@pytest.mark.parametrize(("samples", "batch_size"), [(10, 4), (4, 4), (3, 16), (5, 1)])
def test_every_sample_is_paid_once_and_the_prompt_never_hidden(samples, batch_size):
    spy = Spy(small_model())
    prompt, answer = random_ids(1, 3, 1, MASK)[0], random_ids(1, 4, 2, MASK)[0]
    generator = torch.Generator().manual_seed(0)
    log_likelihood(
        spy,
        prompt,
        answer,
        samples,
        batch_size,
        mask_token_id=MASK,
        generator=generator,
    )
    assert [len(ids) for ids in spy.seen] == [
        min(batch_size, samples - first) for first in range(0, samples, batch_size)
    ]
    canvases = torch.cat(spy.seen)
    assert (canvases[:, :3] == prompt).all()
    hidden = canvases[:, 3:] == MASK
    assert hidden.any(1).all()  # l-of-L hides at least one
    assert ((canvases[:, 3:] == answer) | hidden).all()


def test_value_is_the_mean_over_samples():
    """Not over batches: a last batch of another size counts by its rows."""

    def flat(input_ids):
        return ModelOutput(logits=torch.zeros(*input_ids.shape, MASK + 1))

    # Each hidden token costs log V, so every l-of-L sample costs exactly L log V.
    answer = random_ids(1, 4, 2, MASK)[0]
    for samples in (1, 7, 16, 17):
        value = log_likelihood(flat, answer[:0], answer, samples, 8, mask_token_id=MASK)
        assert value == pytest.approx(-4 * math.log(MASK + 1), rel=1e-6)


def test_same_seed_same_value():
    model = small_model()
    prompt, answer = random_ids(1, 3, 1, MASK)[0], random_ids(1, 6, 2, MASK)[0]
    values = [
        log_likelihood(
            model, prompt, answer, 20, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]
    assert all(value < 0 for value in values)


# Wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, r"samples=0: expected an integer >= 1"),
        ({"batch_size": 0}, r"batch_size=0: expected an integer >= 1"),
        ({"times": "often"}, r"times='often': expected one of"),
    ],
)
def test_wrong_options(options, message):
    word = random_ids(1, 4, 0, MASK)[0]
    with pytest.raises(ValueError, match=message):
        log_likelihood(small_model(), word, word, **options)


def test_empty_answer():
    word = random_ids(1, 4, 0, MASK)[0]
    with pytest.raises(ValueError, match=r"answer_ids=.*: expected at least one token"):
        log_likelihood(small_model(), word, word[:0])


@pytest.mark.parametrize("length", [0, 17])
def test_lengths_that_cannot_be_enumerated(length):
    message = rf"len\(input_ids\)={length}: expected within 1 … 16"
    with pytest.raises(ValueError, match=message):
        exact_log_likelihood(small_model(), torch.zeros(length, dtype=torch.long))


def test_no_mask_token():
    model = tiny_model(mask_token_id=None)
    word = random_ids(1, 3)[0]
    for call in (
        lambda: exact_log_likelihood(model, word),
        lambda: log_likelihood(model, word, word),
    ):
        with pytest.raises(ValueError, match="mask_token_id=None: expected a token id"):
            call()
