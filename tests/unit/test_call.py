"""One way to call any model: what it offers is used, what it lacks is made up for."""

import pytest
import torch
from tiny import random_ids, tiny_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM
from transformers.utils import ModelOutput

from dlmlib.model.call import accepts, logits_at, mask_token_of


class Plain(nn.Module):
    """Takes input_ids and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids):
        return ModelOutput(logits=self.inner(input_ids).logits)


class Wrapper(nn.Module):
    """A data-parallel wrapper: the model is in `.module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Adapter(nn.Module):
    """As peft's: `get_base_model` names the model, forward takes anything."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_model(self):
        return self.base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


def bert() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=13,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForMaskedLM(config).eval()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


# What a model accepts


def test_accepts_reads_the_signature():
    model = tiny_model()
    assert accepts(model, "logit_positions") and accepts(model, "position_ids")
    assert not accepts(Plain(model), "logit_positions")
    assert accepts(bert(), "attention_mask") and not accepts(bert(), "logit_positions")
    assert accepts(lambda input_ids, attention_mask: None, "attention_mask")
    assert not accepts(lambda input_ids: None, "attention_mask")


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        Adapter,
        lambda m: Wrapper(Wrapper(m)),
        lambda m: Wrapper(Adapter(m)),
    ],
)
def test_accepts_sees_through_wrappers(wrap):
    assert accepts(wrap(tiny_model()), "logit_positions")
    assert not accepts(wrap(Plain(tiny_model())), "logit_positions")


# Logits at positions


@pytest.fixture
def canvas():
    ids = random_ids(3, 6)
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[0, [1, 5]] = True
    positions[2, 0] = True
    return ids, positions


def test_computed_or_selected_it_is_the_same(canvas):
    ids, positions = canvas
    model = tiny_model()
    expected = model(ids).logits[positions]
    for one in (model, Plain(model), Wrapper(model), Adapter(model), model.forward):
        ours = logits_at(one, ids, positions)
        assert ours.shape == (3, 13)
        close(ours, expected)


def test_only_what_is_asked_for_is_computed(canvas):
    ids, positions = canvas
    rows = []
    for wrap in (lambda m: m, Wrapper, Adapter):
        model = tiny_model()
        model.lm_head.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape))
        logits_at(wrap(model), ids, positions)
    assert rows == [(3, 32)] * 3


def test_a_bert_from_transformers(canvas):
    ids, positions = canvas
    model = bert()
    close(logits_at(model, ids, positions), model(ids).logits[positions])
    row = random_ids(1, 4)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), row], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    # Absolute positions: only right when counted from the first real token.
    ours = logits_at(model, padded, mask.bool(), attention_mask=mask)
    close(ours, model(row).logits[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_padded_rows_equal_rows_alone(dtype):
    model = tiny_model()
    row = random_ids(1, 4)
    ids = torch.cat([random_ids(1, 6, 1), torch.cat([row * 0, row], 1)[:, 2:]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]).to(dtype)
    ours = logits_at(model, ids, mask.bool(), mask)
    close(ours[:6], model(ids[:1]).logits[0])
    close(ours[6:], model(row).logits[0])


def test_positions_count_from_the_first_real_token():
    seen = {}

    def spy(input_ids, attention_mask, position_ids):
        seen.update(attention_mask=attention_mask, position_ids=position_ids)
        return ModelOutput(logits=torch.zeros(*input_ids.shape, 3))

    ids, mask = random_ids(2, 5), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]).bool()
    logits_at(spy, ids, mask, mask)
    assert seen["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert seen["attention_mask"] is mask


def test_options_are_left_out_where_unknown():
    """No padding, no options; a model without position_ids gets none."""

    def plain(input_ids):
        return ModelOutput(logits=torch.zeros(*input_ids.shape, 3))

    def masked(input_ids, attention_mask):
        return ModelOutput(logits=attention_mask[..., None].float())

    ids, mask = random_ids(1, 3), torch.tensor([[0, 1, 1]])
    assert logits_at(plain, ids, ids > -1).shape == (3, 3)
    assert logits_at(masked, ids, ids > -1, mask).flatten().tolist() == [0, 1, 1]


def test_padding_needs_an_attention_mask():
    ids = random_ids(1, 3)
    with pytest.raises(ValueError, match=r"model='Plain': expected .*attention_mask"):
        logits_at(Plain(tiny_model()), ids, ids > -1, torch.tensor([[0, 1, 1]]))


# The mask token


def test_mask_token_given_beats_the_config():
    model = tiny_model(mask_token_id=12)
    assert mask_token_of(model) == 12
    assert mask_token_of(model, 3) == 3
    assert mask_token_of(model, 0) == 0  # zero is a token like any other
    assert mask_token_of(Plain(model), 7) == 7


def test_mask_token_from_the_model_itself():
    plain = Plain(tiny_model())
    plain.mask_token_id = 4
    assert mask_token_of(plain) == 4


def test_mask_token_unknown():
    for model in (Plain(tiny_model()), tiny_model(mask_token_id=None), bert()):
        with pytest.raises(ValueError, match="mask_token_id=None: expected a token id"):
            mask_token_of(model)
    with pytest.raises(ValueError, match="mask_token_id"):
        mask_token_of(lambda input_ids: None)


def test_mask_token_seen_through_wrappers():
    assert mask_token_of(Wrapper(tiny_model(mask_token_id=12))) == 12
