"""The decoding loop: distributions, invariants, independence, guidance, streams."""

import re
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import (
    LETTERS,
    MASK,
    RaggedTable,
    Votes,
    full_joint,
    gen,
    p_value,
    strings,
    tiny_bert,
    tiny_lm,
    watch,
)
from transformers import TextDiffusionStreamer
from transformers.utils import ModelOutput

from dlmlib.decoding import (
    Blocks,
    Confidence,
    EntropyBound,
    Even,
    Everywhere,
    Factor,
    Remask,
    Scheduled,
    Threshold,
    decode,
)
from dlmlib.decoding.canvas import Canvas
from dlmlib.decoding.propose import NAMED, proposals
from dlmlib.decoding.reuse import Forward
from dlmlib.tasks.toy import Joint
from dlmlib.text import word_tokenizer

ROWS = 6_000
ORDERS = sorted(NAMED)
SURE_ORDERS = [name for name in ORDERS if name != "random"]


def masks(rows: int, length: int) -> torch.Tensor:
    return torch.full((rows, length), MASK)


def draw(joint, steps, propose, rows=ROWS, **options):
    start = masks(rows, joint.length)
    table = joint.denoiser()
    options = dict(temperature=1.0, generator=gen(7)) | options
    return decode(table, start, steps=steps, propose=propose, **options).sequences


# ---------------------------------------------------------------- distributions


@pytest.mark.parametrize(
    "propose", ["random", "left_to_right", "right_to_left", "margin", "entropy"]
)
def test_one_token_a_step_samples_the_joint(propose):
    # The order may look at the canvas, but not at the token it is about to write.
    joint = full_joint(1, length=4)
    samples = draw(joint, steps=4, propose=propose)
    assert p_value(samples, joint.sequences, joint.probabilities) > 1e-3


def test_the_joint_within_blocks_and_after_a_prompt():
    joint = full_joint(1, length=4)
    prompt = torch.full((ROWS, 1), 2)
    out = decode(
        joint.denoiser(),
        prompt,
        length=3,
        block_length=2,
        steps=3,
        propose="random",
        temperature=1.0,
        generator=gen(3),
    )
    weights = joint.probabilities * (joint.sequences[:, 0] == 2)
    expected = weights / weights.sum()
    assert p_value(out.sequences, joint.sequences, expected) > 1e-3


def confidence_law(joint, canvas) -> torch.Tensor:
    """Exact law of decoding by the sampled token's probability, by enumeration."""
    hidden = [i for i, token in enumerate(canvas) if token == MASK]
    if not hidden:
        return (joint.sequences == torch.tensor(canvas)).all(-1).double()
    p = joint.conditionals(torch.tensor([canvas]))[0]
    law = torch.zeros(len(joint.sequences), dtype=torch.float64)
    share: dict[tuple, float] = {}
    for tokens in product(range(LETTERS), repeat=len(hidden)):
        chances = [float(p[i, v]) for i, v in zip(hidden, tokens, strict=True)]
        best = max(range(len(hidden)), key=chances.__getitem__)  # ties to the left
        move = hidden[best], tokens[best]
        share[move] = share.get(move, 0.0) + prod(chances)
    for (column, token), chance in share.items():
        after = [*canvas[:column], token, *canvas[column + 1 :]]
        law += chance * confidence_law(joint, after)
    return law


def test_confidence_order_prefers_likely_tokens():
    # It ranks by the drawn token, so it is a biased sampler even at one token a step.
    joint = full_joint(2, length=3)
    law = confidence_law(joint, [MASK] * 3)
    assert float(law.sum()) == pytest.approx(1)
    assert float((law - joint.probabilities).abs().sum()) / 2 > 0.02
    assert float(law @ joint.probabilities.log()) > -joint.entropy() + 0.02
    samples = draw(joint, steps=3, propose="confidence")
    assert p_value(samples, joint.sequences, law) > 1e-3
    assert p_value(samples, joint.sequences, joint.probabilities) < 1e-6


@pytest.mark.parametrize("propose", ["random", "confidence"])
def test_one_step_is_the_product_of_marginals(propose):
    joint = full_joint(1, length=4)
    marginals = joint.conditionals(masks(1, 4))[0]
    words = joint.sequences
    law = marginals[torch.arange(4), words].prod(-1)
    samples = draw(joint, steps=1, propose=propose)
    assert p_value(samples, words, law) > 1e-3
    assert p_value(samples, words, joint.probabilities) < 1e-6


def test_two_steps_are_between():
    joint = full_joint(1, length=4)
    law = joint.parallel_log_prob(joint.sequences, [[0, 1], [2, 3]]).exp()
    samples = draw(joint, steps=2, propose="left_to_right")
    assert p_value(samples, joint.sequences, law) > 1e-3
    assert p_value(samples, joint.sequences, joint.probabilities) < 1e-6


def test_temperature_sharpens_each_conditional():
    joint = full_joint(4, length=2)
    samples = draw(joint, steps=2, propose="left_to_right", temperature=0.5)
    first = joint.conditionals(masks(1, 2))[0, 0, :LETTERS] ** 2
    rows = torch.tensor([[v, MASK] for v in range(LETTERS)])
    second = joint.conditionals(rows)[:, 1, :LETTERS] ** 2
    law = (first / first.sum())[:, None] * second / second.sum(1, keepdim=True)
    assert p_value(samples, joint.sequences, law.flatten()) > 1e-3


# ---------------------------------------------------------------- invariants

STEPS = 5
COMMITS = {
    "even": lambda: Even(STEPS),
    "scheduled": lambda: Scheduled(STEPS),
    "stochastic": lambda: Scheduled(STEPS, stochastic=True),
    "threshold": lambda: Threshold(0.6),
    "factor": lambda: Factor(1.0),
    "entropy_bound": lambda: EntropyBound(0.5),
}
ROUNDS = 3
REVISIONS = {
    "none": lambda: None,
    "cap": lambda: Remask("cap", eta=0.5, steps=STEPS),
    "rescale": lambda: Remask("rescale", eta=0.7, steps=STEPS),
    "conf": lambda: Remask("conf", steps=STEPS),
    "loop": lambda: Remask("loop", 0.5, STEPS, alpha_on=0.4, rounds=ROUNDS),
}
PROMPTS = [[1, 10, 2, 10], [3], [10, 10, 10, 4, 5]]


def check_invariants(model, prompts, length, block, commit, revise, cfg_scale, out):
    """What every decode must respect, whatever its policies."""
    width = max(map(len, prompts))
    assert out.sequences.shape == (len(prompts), width + length)
    most = 0
    for prompt, row in zip(prompts, out.sequences, strict=True):
        given = row[width - len(prompt) : width]
        known = torch.tensor(prompt) != model.mask_token_id
        assert torch.equal(given[known], torch.tensor(prompt)[known])
        real = row[width - len(prompt) :]
        assert bool(((real >= 0) & (real < 10)).all()), "a mask or no token is left"
        most = max(most, int((~known).sum()) + length)
    calls = 2 if cfg_scale else 1
    blocks = -(-length // block) or 1 if block else 1
    assert out.forwards % calls == 0
    if commit in ("even", "scheduled", "stochastic"):
        extra = ROUNDS * blocks if revise == "loop" else 0
        budget = STEPS + extra
    else:
        extra = STEPS + (ROUNDS if revise == "loop" else 0)
        budget = most if revise == "none" else most + extra * blocks
    assert 1 <= out.forwards // calls <= budget
    if revise == "none":
        total = (out.tokens_per_forward > 0).all()
        assert bool(total)


@pytest.mark.parametrize("revise", REVISIONS)
@pytest.mark.parametrize("commit", COMMITS)
def test_every_combination_of_policies(commit, revise):
    model = Votes()
    seeds = iter(range(1000))
    prompts = [[1, 10], [3, 10, 10]]
    choices = (None, 2), ORDERS, (0.0, 1.0), (0.0, 1.5)
    for block, propose, temperature, cfg_scale in product(*choices):
        out = decode(
            model,
            prompts,
            length=3,
            block_length=block,
            propose=propose,
            commit=COMMITS[commit](),
            revise=REVISIONS[revise](),
            temperature=temperature,
            cfg_scale=cfg_scale,
            generator=gen(next(seeds)),
        )
        check_invariants(model, prompts, 3, block, commit, revise, cfg_scale, out)


rows_of_tokens = st.lists(st.integers(0, 10), min_size=1, max_size=5)


@settings(max_examples=60)
@given(
    prompts=st.lists(rows_of_tokens, min_size=1, max_size=4),
    length=st.integers(0, 7),
    block=st.none() | st.integers(1, 8),
    propose=st.sampled_from(ORDERS),
    commit=st.sampled_from(sorted(COMMITS)),
    revise=st.sampled_from(sorted(REVISIONS)),
    temperature=st.sampled_from([0.0, 0.3, 2.0]),
    cfg_scale=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_any_shape_ends_without_masks(
    prompts, length, block, propose, commit, revise, temperature, cfg_scale, seed
):
    model = Votes(seed)
    if length == 0 and not any(10 in row for row in prompts):
        prompts = [*prompts, [10]]
    out = decode(
        model,
        prompts,
        length=length,
        block_length=block,
        propose=propose,
        commit=COMMITS[commit](),
        revise=REVISIONS[revise](),
        temperature=temperature,
        cfg_scale=cfg_scale,
        generator=gen(seed),
    )
    width = max(map(len, prompts))
    for prompt, row in zip(prompts, out.sequences.tolist(), strict=True):
        real = row[width - len(prompt) :]
        assert 10 not in real
        kept = [a == b for a, b in zip(prompt, real, strict=False) if a != 10]
        assert all(kept)
    adaptive = commit in ("threshold", "factor", "entropy_bound")
    if not adaptive and revise != "loop":
        assert out.forwards <= STEPS * (2 if cfg_scale else 1)


def test_default_is_one_token_a_step_and_counts_what_it_cost():
    out = decode(Votes(), [1, 2], length=6)
    assert out.forwards == 6 and out.tokens_per_forward.tolist() == [1.0]
    out = decode(Votes(), [1, 2], length=6, steps=2, cfg_scale=1.0)
    assert out.forwards == 4 and out.tokens_per_forward.tolist() == [1.5]


def test_a_mask_is_never_proposed():
    class LovesMasks(nn.Module):
        mask_token_id = 2

        def forward(self, input_ids):
            logits = torch.tensor([0.0, 1.0, 50.0]).expand(*input_ids.shape, 3)
            return ModelOutput(logits=logits)

    greedy = decode(LovesMasks(), [0], length=3)
    assert greedy.sequences.tolist() == [[0, 1, 1, 1]]
    drawn = decode(LovesMasks(), [0], length=50, temperature=1.0, generator=gen())
    assert set(drawn.sequences[0].tolist()) == {0, 1}


# ---------------------------------------------------------------- ends of the text


class Ending(nn.Module):
    """Tokens a, b, end at fixed logits; "end" is the likelier, the further right."""

    mask_token_id = 3

    def forward(self, input_ids):
        rows, columns = input_ids.shape
        logits = torch.zeros(rows, columns, 4)
        logits[..., 1] = 0.5 - 0.1 * torch.arange(columns)
        logits[..., 2] = 0.4 * torch.arange(columns)
        logits[..., 3] = -torch.inf
        return ModelOutput(logits=logits)


def test_suppressed_tokens_are_out_of_the_softmax():
    out = decode(Ending(), [0], length=4, suppress_tokens=[2], trace=True)
    assert 2 not in out.sequences
    b = torch.tensor([0.4, 0.3, 0.2, 0.1]).sigmoid()
    assert out.trace.order() == [1, 2, 3, 4]
    torch.testing.assert_close(out.trace.commit_logprob[0, 1:], b.log())


def test_suppression_is_sampling_without_the_token():
    """Draws follow the softmax of the rest."""
    options = dict(length=1, temperature=1.0, suppress_tokens=[0])
    ids = torch.zeros(20_000, 1, dtype=torch.long)
    drawn = decode(Ending(), ids, generator=gen(3), **options).sequences[:, 1:]
    words = torch.arange(3)[:, None]
    weight = torch.tensor([-torch.inf, 0.4, 0.4]).double().exp()
    assert p_value(drawn, words, weight / weight.sum()) > 1e-3


def test_ends_are_written_last():
    """Plain confidence begins with the ends; `last` leaves them for the end."""
    plain = decode(Ending(), [0], length=4, trace=True)
    after = decode(Ending(), [0], length=4, propose=Confidence(last=[2]), trace=True)
    assert torch.equal(plain.sequences, after.sequences)
    ends = plain.sequences[0, 1:] == 2
    assert ends.tolist() == [False, True, True, True]
    first, then = (out.trace.commit_step[0, 1:] for out in (plain, after))
    assert first[ends].max() < first[~ends].min()
    assert then[ends].min() > then[~ends].max()


def test_rank_of_the_others_is_without_the_last_tokens():
    """p(token) / (1 - p(last)), as if the last tokens did not exist."""
    logits = torch.randn(50, 6, generator=gen(4)).double()
    columns, none = torch.arange(50), 99
    ours = proposals(Confidence(last=[1, 4]), logits, columns, none)
    rest = logits[:, [0, 2, 3, 5]].log_softmax(-1).max(-1).values
    ending = torch.isin(ours.token, torch.tensor([1, 4]))
    assert ending.any() and not ending.all()
    torch.testing.assert_close(ours.score[~ending], rest[~ending])
    assert ours.score[ending].max() < rest.min()
    assert ours.score[ending].isfinite().all()  # or a closed position might be taken


# ---------------------------------------------------------------- independent rows

ALONE = {name: COMMITS[name] for name in COMMITS if name != "stochastic"}


def assert_rows_alone(model, prompts, length, **options):
    """A greedy batch, in either order of its rows, equals every row on its own."""
    both = decode(model, prompts, length=length, **options).sequences
    swapped = decode(model, prompts[::-1], length=length, **options).sequences
    assert torch.equal(both, swapped.flip(0))
    width = max(map(len, prompts))
    for prompt, row in zip(prompts, both, strict=True):
        alone = decode(model, [prompt], length=length, **options).sequences[0]
        assert torch.equal(row[width - len(prompt) :], alone), (prompt, options)


@pytest.mark.parametrize("propose", SURE_ORDERS)
@pytest.mark.parametrize("commit", ALONE)
def test_rows_alone_with_every_policy(commit, propose):
    for block, cfg_scale in product((None, 3), (0.0, 1.5)):
        options = dict(block_length=block, cfg_scale=cfg_scale, propose=propose)
        assert_rows_alone(Votes(3), PROMPTS, 4, commit=ALONE[commit](), **options)


@pytest.mark.parametrize("commit", ALONE)
def test_rows_alone_with_exact_conditionals(commit):
    prompts = [[0, MASK], [2], [MASK, 1, 0]]
    model = RaggedTable(5, lengths=(4, 5, 6))
    for block, propose in product((None, 2), ("confidence", "entropy")):
        options = dict(block_length=block, propose=propose, commit=ALONE[commit]())
        assert_rows_alone(model, prompts, 3, **options)
    assert_rows_alone(model, prompts, 3, cfg_scale=1.0, commit=ALONE[commit]())


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(num_key_value_heads=1, qkv_bias=True),
        dict(attention="causal"),
        dict(attention="causal", shift_logits=True),
        pytest.param(
            dict(attention="block_causal", block_length=3),
        ),
    ],
    ids=str,
)
def test_rows_alone_with_the_network(config):
    for seed, commit in enumerate(ALONE.values()):
        model = tiny_lm(seed, **config)
        options = dict(block_length=3, commit=commit())
        assert_rows_alone(model, [[1, 10, 2, 3], [4], [5, 6, 10]], 5, **options)


def test_rows_alone_when_a_shifted_row_starts_with_a_mask():
    for seed in range(4):
        model = tiny_lm(seed, shift_logits=True)
        assert_rows_alone(model, [[1, 2, 3, 4], [10, 5]], 3, steps=4)


def test_rows_alone_with_a_bert_of_transformers():
    for seed, commit in enumerate(ALONE.values()):
        options = dict(mask_token_id=10, block_length=3, commit=commit())
        assert_rows_alone(tiny_bert(seed), PROMPTS, 5, **options)


def test_rows_alone_by_default():
    for seed in range(10):
        prompts = [[1, 2, 3], [10, 10, 10]]
        assert_rows_alone(Votes(seed), prompts, 4, block_length=3)


def test_padding_given_as_a_mask_equals_a_list_of_rows():
    model = Votes(1)
    listed = decode(model, [[1, 2, 3], [4]], length=4, steps=2).sequences
    padded = torch.tensor([[1, 2, 3], [10, 10, 4]])  # what pads does not matter
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    out = decode(model, padded, length=4, steps=2, attention_mask=mask).sequences
    assert torch.equal(out[0], listed[0]) and torch.equal(out[1, 2:], listed[1, 2:])
    assert out[1, :2].tolist() == [10, 10]


def test_finished_rows_are_left_out():
    model = Votes()
    seen = watch(model)
    prompts = torch.tensor([[1, 2, 10], [1, 10, 10], [10, 10, 10]])
    out = decode(model, prompts, steps=3)
    assert [len(call) for call in seen] == [3, 2, 1]
    assert torch.equal(seen[2][0][seen[2][0] != 10], out.sequences[2][seen[2][0] != 10])
    assert out.forwards == 3 and out.tokens_per_forward.tolist() == [1.0, 1.0, 1.0]


def test_a_sampled_row_has_its_own_distribution_beside_others():
    joint = full_joint(1, length=3)
    start = masks(ROWS, 3)
    start[::2] = torch.tensor([0, MASK, 1])
    out = decode(
        joint.denoiser(),
        start,
        steps=3,
        propose="random",
        temperature=1.0,
        generator=gen(5),
    )
    words, p = joint.sequences, joint.probabilities
    assert p_value(out.sequences[1::2], words, p) > 1e-3
    given_ends = p * (words[:, 0] == 0) * (words[:, 2] == 1)
    expected = given_ends / given_ends.sum()
    assert p_value(out.sequences[::2], words, expected) > 1e-3


# ---------------------------------------------------------------- guidance


def test_guidance_formula_and_what_the_blind_half_sees():
    model = Votes(2)
    seen = watch(model)
    canvas = Canvas.start([[1, 2, 10, 3], [4]], 2, 10)
    open_ = canvas.masked
    lazy = Forward(model, canvas, None, 1.5)(torch.arange(2), open_)
    guided = torch.cat(list(lazy.split(3)))
    assert len(seen) == 1 and len(seen[0]) == 4
    assert torch.equal(seen[0][:2], canvas.ids)
    real = canvas.valid
    assert bool((seen[0][2:][real] == 10).all())
    assert torch.equal(seen[0][2:][~real], canvas.ids[~real])
    told = model(canvas.ids, canvas.valid).logits[open_]
    untold = model(seen[0][2:], canvas.valid).logits[open_]
    torch.testing.assert_close(guided, 2.5 * told - 1.5 * untold)


def test_guidance_of_zero_is_none():
    options = dict(length=6, steps=3, temperature=1.0)
    plain = decode(Votes(), [1, 2], generator=gen(), **options)
    zero = decode(Votes(), [1, 2], generator=gen(), cfg_scale=0.0, **options)
    strong = decode(Votes(), [1, 2], generator=gen(), cfg_scale=3.0, **options)
    assert torch.equal(plain.sequences, zero.sequences)
    assert (plain.forwards, zero.forwards, strong.forwards) == (3, 3, 6)
    assert not torch.equal(plain.sequences, strong.sequences)


def test_guidance_keeps_written_tokens_in_the_blind_half():
    model = Votes()
    seen = watch(model)
    decode(model, [1, 2], length=3, cfg_scale=1.0)
    blind = seen[2][1]
    assert blind[:2].tolist() == [10, 10]
    assert torch.equal(blind[2:], seen[2][0, 2:])
    assert int((blind[2:] == 10).sum()) == 1


def test_guidance_samples_the_sharpened_conditional():
    joint = full_joint(6, length=2)
    scale = 1.5
    out = decode(
        joint.denoiser(),
        torch.zeros(ROWS, 1, dtype=torch.long),
        length=1,
        temperature=1.0,
        cfg_scale=scale,
        generator=gen(1),
    )
    told = joint.conditionals(torch.tensor([[0, MASK]]))[0, 1, :LETTERS]
    untold = joint.conditionals(masks(1, 2))[0, 1, :LETTERS]
    law = told ** (scale + 1) / untold**scale
    words = torch.tensor([[0, v] for v in range(LETTERS)])
    assert p_value(out.sequences, words, law / law.sum()) > 1e-3
    assert p_value(out.sequences, words, told) < 1e-6


def test_guidance_never_writes_the_impossible():
    # Both halves give an impossible token -inf, and -inf - -inf is not a number.
    words = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 1], [2, 2, 0]])
    joint = Joint(words, torch.tensor([1.0, 2.0, 3.0, 4.0]), LETTERS + 1, MASK)
    for prompt in ([0], [1], [2]):
        out = decode(joint.denoiser(), prompt, length=2, cfg_scale=2.0, trace=True)
        assert bool(joint.log_prob(out.sequences).isfinite())
        assert bool(out.trace.commit_logprob[0, 1:].isfinite().all())


# ---------------------------------------------------------------- infilling


@pytest.mark.parametrize(
    "prompt", [[0, 1, MASK, MASK], [MASK, MASK, 0, 1], [0, MASK, MASK, 1], [MASK] * 4]
)
def test_infilling_draws_from_the_conditional(prompt):
    joint = full_joint(9, length=4)
    start = torch.tensor(prompt).repeat(ROWS, 1)
    table = joint.denoiser()
    options = dict(propose="random", temperature=1.0, generator=gen(2))
    out = decode(table, start, **options).sequences
    known = torch.tensor(prompt) != MASK
    agrees = (joint.sequences[:, known] == torch.tensor(prompt)[known]).all(-1)
    law = joint.probabilities * agrees
    assert p_value(out, joint.sequences, law / law.sum()) > 1e-3


def test_left_to_right_on_a_causal_network_is_greedy_generation():
    for seed in range(3):
        model = tiny_lm(
            seed, attention="causal", shift_logits=True, num_hidden_layers=2
        )
        ids = torch.tensor([[3, 1, 4]])
        out = decode(model, ids, length=8, propose="left_to_right")
        plain = tiny_lm(seed, attention="causal", num_hidden_layers=2)
        by_hand = ids
        with torch.no_grad():
            for _ in range(8):
                logits = plain(by_hand).logits[:, -1]
                logits[:, 10] = -torch.inf
                by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(out.sequences, by_hand)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("propose", ORDERS)
@pytest.mark.parametrize("commit", COMMITS)
def test_blocks_are_filled_in_order(commit, propose):
    options = dict(propose=propose, commit=COMMITS[commit](), generator=gen(4))
    out = decode(Votes(1), PROMPTS, length=8, block_length=3, trace=True, **options)
    step = out.trace.commit_step
    first_block = step[:, :8].max(1).values  # masks of the prompt belong to it
    assert bool((first_block < step[:, 8:11].min(1).values).all())
    assert bool((step[:, 8:11].max(1).values < step[:, 11:].min(1).values).all())


def test_everywhere_does_not_respect_blocks():
    out = decode(Votes(1), [1], length=6, propose="right_to_left", trace=True)
    assert out.trace.order() == [6, 5, 4, 3, 2, 1]
    options = dict(propose="right_to_left", trace=True)
    out = decode(Votes(1), [1], length=5, where=Blocks(2), **options)
    assert out.trace.order() == [2, 1, 4, 3, 5]  # the last block is shorter
    out = decode(Votes(1), [1], length=5, where=Everywhere(), **options)
    assert out.trace.order() == [5, 4, 3, 2, 1]


def test_steps_are_shared_by_the_blocks_remainder_first():
    out = decode(Votes(), [1], length=12, block_length=4, steps=7, trace=True)
    counts = out.trace.written[:, 0].sum(1).tolist()
    assert counts == [2, 1, 1, 2, 2, 2, 2]
    assert out.trace.commit_step[0, 1:5].max() == 2


def test_rows_move_through_the_blocks_on_their_own():
    # A sure row writes each block at once; a row that is never sure takes its time.
    class Sure(nn.Module):
        mask_token_id = 3

        def forward(self, input_ids):
            sharp = torch.where(input_ids[:, :1] == 0, 20.0, 0.5)
            logits = sharp[..., None] * torch.tensor([1.0, 0.0, 0.0, 0.0])
            return ModelOutput(logits=logits.expand(*input_ids.shape, 4))

    prompts = torch.tensor([[0], [1]])
    options = dict(length=6, block_length=3, commit=Threshold(0.9), trace=True)
    out = decode(Sure(), prompts, **options)
    assert out.trace.commit_step[0, 1:].tolist() == [0, 0, 0, 1, 1, 1]
    assert out.trace.commit_step[1, 1:].tolist() == [0, 1, 2, 3, 4, 5]
    assert out.forwards == 6 and out.tokens_per_forward.tolist() == [3.0, 1.0]


# ---------------------------------------------------------------- any module


def test_a_module_without_padding_support_takes_equal_rows_only():
    class Bare(nn.Module):
        mask_token_id = 10

        def __init__(self):
            super().__init__()
            self.inner = Votes()

        def forward(self, input_ids):
            return self.inner(input_ids)

    equal = decode(Bare(), [[1, 2], [3, 4]], length=3)
    same = decode(Votes(), [[1, 2], [3, 4]], length=3)
    assert torch.equal(equal.sequences, same.sequences)
    with pytest.raises(ValueError, match=r"model='Bare': expected .*attention_mask"):
        decode(Bare(), [[1, 2], [3]], length=3)


def test_wrapped_modules_are_seen_through():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **options):
            return self.module(*args, **options)

    model = tiny_lm(2)
    inner = decode(model, [[1, 2], [3]], length=4).sequences
    outer = decode(Wrapper(model), [[1, 2], [3]], length=4, mask_token_id=10).sequences
    assert torch.equal(inner, outer)


def test_mask_token_can_be_named_by_hand():
    out = decode(Votes(), [1, 9], length=0, mask_token_id=9)
    assert out.sequences[0, 0] == 1 and out.sequences[0, 1] != 9


def test_single_rows_lists_and_tensors_agree():
    model = Votes()
    one = decode(model, [1, 2, 3], length=3).sequences
    assert one.shape == (1, 6)
    for prompt in (
        [[1, 2, 3]],
        torch.tensor([1, 2, 3]),
        torch.tensor([[1, 2, 3]]),
        torch.tensor([[1, 2, 3]], dtype=torch.int32),
        [torch.tensor([1, 2, 3])],
    ):
        assert torch.equal(decode(model, prompt, length=3).sequences, one)


def test_an_empty_prompt_is_allowed():
    joint = full_joint(3, length=3)
    out = decode(joint.denoiser(), [[]], length=3, propose="left_to_right").sequences
    assert out.shape == (1, 3) and bool((out < MASK).all())


def test_a_policy_object_equals_its_name():
    for name, policy in NAMED.items():
        options = dict(length=5, steps=3, temperature=1.0)
        a = decode(Votes(), [1], propose=name, generator=gen(), **options)
        b = decode(Votes(), [1], propose=policy(), generator=gen(), **options)
        assert torch.equal(a.sequences, b.sequences)


# ---------------------------------------------------------------- randomness

RANDOM = dict(
    length=8,
    propose="random",
    commit=Scheduled(8, stochastic=True),
    revise=Remask("cap", eta=0.5),
    temperature=1.0,
)


def test_same_seed_same_answer():
    outs = [
        decode(Votes(), PROMPTS, generator=gen(s), **RANDOM).sequences
        for s in (1, 1, 2, 3)
    ]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2]) and not torch.equal(outs[2], outs[3])


def test_the_generator_is_the_only_source():
    before = torch.get_rng_state()
    generator = gen(3)
    drawn = generator.get_state()
    decode(Votes(), PROMPTS, generator=generator, **RANDOM)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), drawn)


def test_greedy_decoding_draws_nothing():
    before, generator = torch.get_rng_state(), gen(3)
    drawn = generator.get_state()
    decode(Votes(), PROMPTS, length=4, generator=generator)
    decode(Votes(), PROMPTS, length=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), drawn)


def test_without_a_generator_torchs_own_is_used():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        a = decode(Votes(), PROMPTS, **RANDOM).sequences
        torch.manual_seed(5)
        b = decode(Votes(), PROMPTS, **RANDOM).sequences
        torch.manual_seed(6)
        c = decode(Votes(), PROMPTS, **RANDOM).sequences
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---------------------------------------------------------------- streamers


class FakeStreamer:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.clone()))

    def put_draft(self, value):
        self.events.append(("draft", value.clone()))

    def end(self):
        self.events.append(("end", None))


def test_streamer_sees_prompt_drafts_answer_end():
    streamer = FakeStreamer()
    out = decode(Votes(), [1, 2], length=6, steps=3, streamer=streamer)
    kinds = [kind for kind, _ in streamer.events]
    assert kinds == ["put", "draft", "draft", "draft", "put", "end"]
    values = [value for _, value in streamer.events]
    assert values[0].tolist() == [[1, 2]]
    assert [int((draft == 10).sum()) for draft in values[1:4]] == [4, 2, 0]
    assert torch.equal(values[4], out.sequences[:, 2:])


def test_streamer_without_drafts():
    class Plain:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.tolist())

        def end(self):
            self.seen.append("end")

    streamer = Plain()
    out = decode(Votes(), [1, 2], length=3, streamer=streamer)
    assert streamer.seen == [[[1, 2]], out.sequences[:, 2:].tolist(), "end"]


def test_transformers_streamer_prints_prompt_and_answer(capsys):
    tokenizer = word_tokenizer(["a", "b", "c", "d", "e", "f", "g"])  # 11 tokens
    prompt = tokenizer.encode("a b c")
    streamer = TextDiffusionStreamer(tokenizer)
    out = decode(tiny_lm(1), prompt, length=4, mask_token_id=1, streamer=streamer)
    printed = capsys.readouterr().out
    drafts = re.findall("\033\\[33m(.*?)\033\\[0m", printed)
    assert [draft.count("[MASK]") for draft in drafts] == [3, 2, 1, 0]
    assert drafts[-1] == tokenizer.decode(out.sequences[0, 3:])
    kept = re.sub("\0337\033\\[33m.*?\033\\[0m\0338\033\\[J", "", printed)
    assert kept == tokenizer.decode(out.sequences[0]) + "\n"


def test_streamer_shows_infilled_tokens():
    streamer = FakeStreamer()
    out = decode(Votes(), [1, 10, 2, 10], streamer=streamer)
    shown = torch.cat([v for kind, v in streamer.events if kind == "put"], dim=1)
    assert torch.equal(shown, out.sequences)


def test_words_of_the_toys_are_lexical():
    assert strings(2, 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
