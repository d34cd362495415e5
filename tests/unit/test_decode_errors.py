"""Wrong input: the message names argument, value and range, and nothing is lost."""

import pytest
import torch
from torch import nn
from toys import Votes, gen, tiny_bert, tiny_lm

from dlmlib.decoding import (
    Blocks,
    EntropyBound,
    Even,
    Everywhere,
    Factor,
    Remask,
    Scheduled,
    Threshold,
    decode,
)

NAN = float("nan")
LEFT = torch.tensor([[0, 1, 1]])

# options of decode (prompt [1, 2, 3], length 4 unless given), and the message
WRONG = [
    (dict(steps=0), "steps=0: expected an integer >= 1"),
    (dict(steps=-3), "steps=-3: expected an integer >= 1"),
    (dict(steps=2.5), "steps=2.5: expected an integer >= 1"),
    (dict(temperature=-0.1), "temperature=-0.1: expected >= 0"),
    (dict(temperature=NAN), "temperature=nan: expected >= 0"),
    (dict(cfg_scale=-1.0), "cfg_scale=-1.0: expected >= 0"),
    (dict(cfg_scale=NAN), "cfg_scale=nan: expected >= 0"),
    (dict(suppress_tokens=[1, -1]), "suppress_tokens=[1, -1]: expected token ids >= 0"),
    (dict(suppress_tokens=[0.5]), "suppress_tokens=[0.5]: expected token ids >= 0"),
    (dict(length=-1), "length=-1: expected an integer >= 0"),
    (dict(length=2.0), "length=2.0: expected an integer >= 0"),
    (dict(length=0), "length=0: expected >= 1, or a [MASK] in the prompt"),
    (dict(block_length=0), "block_length=0: expected an integer >= 1"),
    (dict(block_length=1.5), "block_length=1.5: expected an integer >= 1"),
    (dict(steps=2, commit=Even(2)), "steps=2: expected None, since commit is given"),
    (
        dict(block_length=2, where=Everywhere()),
        "block_length=2: expected None, since where is given",
    ),
    (
        dict(block_length=2, where=Blocks(2)),
        "block_length=2: expected None, since where is given",
    ),
    (dict(steps=3, block_length=1), "steps=3: expected >= 4, one a block"),
    (
        dict(commit=Scheduled(1), where=Blocks(3)),
        "steps=1: expected >= 2, one a block",
    ),
    (dict(propose="best"), "propose='best': expected a policy or one of ["),
    (
        dict(commit=Threshold(0.9), revise=Remask()),
        "revise.steps=None: expected an integer >= 1 with an adaptive commit",
    ),
    (
        dict(attention_mask=torch.ones(1, 2)),
        "attention_mask.shape=(1, 2): expected (1, 3)",
    ),
    (
        dict(attention_mask=torch.ones(2, 3)),
        "attention_mask.shape=(2, 3): expected (1, 3)",
    ),
    (
        dict(attention_mask=torch.tensor([[1, 1, 0]])),
        "attention_mask=tensor([[1, 1, 0]]): expected padding on the left only",
    ),
    (
        dict(attention_mask=torch.tensor([[1, 0, 1]])),
        "attention_mask=tensor([[1, 0, 1]]): expected padding on the left only",
    ),
]


@pytest.mark.parametrize("options, message", WRONG, ids=[m[:40] for _, m in WRONG])
def test_wrong_options(options, message):
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError) as error:
        decode(Votes(), prompt, **dict(length=4) | options)
    assert message in str(error.value)
    assert prompt.tolist() == [[1, 2, 3]]
    # the same prompt decodes once the argument is right
    assert decode(Votes(), prompt, length=4).sequences.shape == (1, 7)


BUILD = [
    (lambda: Even(0), "steps=0: expected an integer >= 1"),
    (lambda: Scheduled(0), "steps=0: expected an integer >= 1"),
    (lambda: Scheduled(4, eps=0.0), "eps=0.0: expected within (0, 1)"),
    (lambda: Scheduled(4, eps=1), "eps=1: expected within (0, 1)"),
    (lambda: Threshold(0), "threshold=0: expected within (0, 1]"),
    (lambda: Threshold(-0.5), "threshold=-0.5: expected within (0, 1]"),
    (lambda: Threshold(1.01), "threshold=1.01: expected within (0, 1]"),
    (lambda: Threshold(NAN), "threshold=nan: expected within (0, 1]"),
    (lambda: Factor(0), "factor=0: expected > 0"),
    (lambda: Factor(-1.0), "factor=-1.0: expected > 0"),
    (lambda: EntropyBound(-0.1), "bound=-0.1: expected >= 0 nats"),
    (lambda: EntropyBound(NAN), "bound=nan: expected >= 0 nats"),
    (lambda: Blocks(0), "block_length=0: expected an integer >= 1"),
    (lambda: Blocks(-2), "block_length=-2: expected an integer >= 1"),
    (
        lambda: Remask("never"),
        "rule='never': expected one of ('cap', 'rescale', 'conf', 'loop')",
    ),
    (lambda: Remask(eta=-0.1), "eta=-0.1: expected within [0, 1]"),
    (lambda: Remask(eta=1.1), "eta=1.1: expected within [0, 1]"),
    (lambda: Remask(steps=0), "steps=0: expected None or an integer >= 1"),
    (lambda: Remask("loop", alpha_on=0.0), "alpha_on=0.0: expected within (0, 1)"),
    (lambda: Remask("loop", alpha_on=1.0), "alpha_on=1.0: expected within (0, 1)"),
    (lambda: Remask("loop", rounds=-1), "rounds=-1: expected an integer >= 0"),
]


@pytest.mark.parametrize("build, message", BUILD, ids=[m[:40] for _, m in BUILD])
def test_policies_refuse_numbers_outside_their_range(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Threshold(1.0),
        lambda: Threshold(1e-9),
        lambda: EntropyBound(0.0),
        lambda: Factor(1e-9),
        lambda: Even(1),
    ],
)
def test_the_ends_of_a_range_are_accepted(build):
    out = decode(Votes(), [1], length=4, commit=build())
    assert not bool((out.sequences == 10).any())


PROMPTS = [
    ([], "prompt_ids=[]: expected at least one row"),
    (torch.zeros(1, 2, 3).long(), "prompt_ids.dim()=3: expected 1 or 2"),
    (torch.tensor(3), "prompt_ids.dim()=0: expected 1 or 2"),
    ([1, 2, 11], "prompt_ids=11: expected token ids in 0 … 10"),
    (torch.tensor([[1, 2], [3, 64]]), "prompt_ids=64: expected token ids in 0 … 10"),
    ([[1, 2], [-1]], "prompt_ids=-1: expected token ids in 0 … 10"),
    ([[1, -100], [99]], "prompt_ids=-100: expected token ids in 0 … 10"),
]


@pytest.mark.parametrize("prompt, message", PROMPTS, ids=[m[:40] for _, m in PROMPTS])
def test_wrong_prompts(prompt, message):
    before = prompt.clone() if isinstance(prompt, torch.Tensor) else repr(prompt)
    for model in (tiny_lm(), tiny_bert()):
        with pytest.raises(ValueError) as error:
            decode(model, prompt, length=3, mask_token_id=10)
        assert message in str(error.value)
    if isinstance(prompt, torch.Tensor):
        assert torch.equal(prompt, before)
    else:
        assert repr(prompt) == before


def test_a_list_brings_its_own_padding():
    message = "attention_mask='given': expected none with a list of rows"
    with pytest.raises(ValueError) as error:
        decode(Votes(), [[1, 2, 3]], length=2, attention_mask=LEFT)
    assert message in str(error.value)


def test_nobody_names_the_mask_token():
    message = "mask_token_id=None: expected a token id, since the model's config"
    for model in (tiny_bert(), tiny_lm(mask_token_id=None), nn.Identity()):
        with pytest.raises(ValueError) as error:
            decode(model, [1, 2], length=2)
        assert message in str(error.value)


def test_masks_under_padding_are_not_decoded():
    prompt = torch.tensor([[10, 1, 2]])
    with pytest.raises(ValueError, match="length=0: expected >= 1, or a"):
        decode(Votes(), prompt, attention_mask=LEFT)
    out = decode(Votes(), prompt, length=1, attention_mask=LEFT)
    assert out.sequences[0, :3].tolist() == [10, 1, 2]


def test_a_streamer_takes_one_row_and_hears_nothing_otherwise():
    heard = []

    class Streamer:
        put = put_draft = heard.append

        def end(self):
            heard.append("end")

    with pytest.raises(ValueError, match="streamer='given': expected a batch of one"):
        decode(Votes(), [[1], [2]], length=2, streamer=Streamer())
    assert heard == []


def test_the_model_is_not_called_before_the_input_is_checked():
    class Costly(Votes):
        def forward(self, *args, **options):
            raise AssertionError("called")

    for options, _ in WRONG:
        with pytest.raises(ValueError):
            decode(Costly(), torch.tensor([[1, 2, 3]]), **dict(length=4) | options)
    with pytest.raises(AssertionError, match="called"):
        decode(Costly(), torch.tensor([[1, 2, 3]]), length=4)


def test_the_prompt_and_the_mask_stay_as_they_were():
    prompt = torch.tensor([[10, 10, 3], [10, 2, 3]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    before = prompt.clone(), mask.clone()
    for length in (0, 4):
        out = decode(
            Votes(),
            prompt,
            length=length,
            attention_mask=mask,
            revise=Remask(eta=0.9),
            generator=gen(),
            steps=8,
            trace=True,
        )
        assert torch.equal(prompt, before[0]) and torch.equal(mask, before[1])
        out.sequences.fill_(0)  # the answer is no view of the prompt or the trace
        assert torch.equal(prompt, before[0])
        assert bool((out.trace.start == 10).any())


def test_an_error_of_the_model_leaves_the_prompt():
    class Breaks(Votes):
        calls = 0

        def forward(self, *args, **options):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("out of memory")
            return super().forward(*args, **options)

    prompt = torch.tensor([[1, 10, 10]])
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(Breaks(), prompt, length=4)
    assert prompt.tolist() == [[1, 10, 10]]
