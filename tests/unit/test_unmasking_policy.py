"""The order head and its distribution: sums over every order."""

from itertools import permutations

import pytest
import torch
from tiny import random_ids, tiny_model

import dlmlib as dlm
from dlmlib.device import generator
from dlmlib.rl.unmasking_policy import Learned, OrderHead, plackett_luce


def ranks_of(order, length):
    rank = torch.full((length,), -1)
    rank[list(order)] = torch.arange(len(order))
    return rank


@pytest.mark.parametrize("drawn", [1, 2, 3, 4])
def test_probabilities_of_all_orders_sum_to_one(drawn):
    score = torch.randn(6, generator=generator(drawn)).double()
    open_ = torch.tensor([True, False, True, True, False, True])
    orders = list(permutations(open_.nonzero()[:, 0].tolist(), drawn))
    rank = torch.stack([ranks_of(order, 6) for order in orders])
    rows = len(orders)
    terms = plackett_luce(score.expand(rows, -1), open_.expand(rows, -1), rank)
    assert terms.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-9)
    first = torch.tensor([order[0] == 2 for order in orders])
    share = score[open_].softmax(0)[1].item()
    total = terms.sum(1).exp()[first].sum().item()
    assert total == pytest.approx(share, abs=1e-9)


def test_gumbel_ranks_draw_from_it():
    """Sorting h + Gumbel noise is drawing without replacement from softmax(h)."""
    score, rows = torch.tensor([1.0, 0.0, -1.0]), 40_000
    u = torch.rand(rows, 3, generator=generator(0), dtype=torch.float64)
    order = (score - (-u.log()).log()).argsort(1, descending=True)
    for wanted in permutations(range(3)):
        found = (order == torch.tensor(wanted)).all(1).double().mean().item()
        rank = ranks_of(wanted, 3)[None]
        log_p = plackett_luce(score[None], torch.ones(1, 3).bool(), rank).sum()
        chance = log_p.exp().item()
        assert abs(found - chance) < 4 * (chance * (1 - chance) / rows) ** 0.5


def test_its_gradient_is_finite_and_touches_open_positions_only():
    score = torch.randn(1, 5, generator=generator(0), requires_grad=True)
    open_ = torch.tensor([[True, True, False, True, True]])
    rank = torch.tensor([[-1, 1, -1, 0, -1]])
    plackett_luce(score, open_, rank).sum().backward()
    assert score.grad.isfinite().all()
    assert score.grad[0, 2] == 0
    assert score.grad.sum().abs() < 1e-6  # a common shift of h changes nothing


def test_a_closed_position_cannot_be_drawn():
    with pytest.raises(ValueError, match="rank"):
        plackett_luce(
            torch.zeros(1, 2), torch.tensor([[True, False]]), torch.ones(1, 2)
        )


def test_untrained_it_prefers_nothing_and_rows_do_not_mix():
    config = tiny_model().config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = OrderHead(config)
    states = torch.randn(3, 7, config.hidden_size, generator=generator(1))
    masked = torch.rand(3, 7, generator=generator(2)) < 0.5
    time = torch.tensor([0.0, 0.25, 0.9])
    with torch.no_grad():
        assert not head(states, time, masked, masked).any()
        head.score.weight.normal_(generator=generator(3))
        every = head(states, time, masked, masked)
        alone = head(states[1:2], time[1:2], masked[1:2], masked[1:2])
        later = head(states[1:2], time[2:3], masked[1:2], masked[1:2])
    torch.testing.assert_close(every[1:2], alone)
    assert (later - alone).abs().max() > 1e-3


def test_a_folder_without_a_head_is_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="order head"):
        OrderHead.from_pretrained(tmp_path, model.config)


def policy_and_head():
    model = tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = OrderHead(model.config).requires_grad_(False)
        head.score.weight.normal_()
    return model, head


def test_decoding_asks_the_head_at_every_step():
    """Every written position is the head's first choice on the canvas before it."""
    model, head = policy_and_head()
    prompt = random_ids(3, 4)
    out = dlm.decode(model, prompt, length=6, propose=Learned(head), trace=True)
    for step in range(6):
        canvas = out.trace.canvas(step)
        with torch.no_grad():
            states = model(canvas, output_hidden_states=True).hidden_states[-1][:, 4:]
            masked = canvas[:, 4:] == 12
            time = torch.full((3,), step / 6)
            h = head(states, time, masked, torch.ones_like(masked))
        first = h.masked_fill(~masked, -torch.inf).argmax(1)
        assert torch.equal(out.trace.written[step, :, 4:].int().argmax(1), first)


def test_rows_and_extras_do_not_change_it():
    model, head = policy_and_head()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    options = {"length": 6, "propose": Learned(head), "block_length": 3}
    both = dlm.decode(model, prompts, **options)
    for row, prompt in enumerate(prompts):
        alone = dlm.decode(model, [prompt], **options)
        assert torch.equal(both.sequences[row, -6:], alone.sequences[0, -6:])
    drafted = dlm.decode(model, prompts, reuse=dlm.Speculate(2), **options)
    assert torch.equal(drafted.sequences, both.sequences)


def test_inside_a_text_it_reads_from_the_first_mask_on():
    """Given tokens behind it are read, but they are neither masked nor in the time."""
    model, head = policy_and_head()
    heard = []
    head.register_forward_hook(lambda m, args, out: heard.append(args))
    rows = torch.tensor([[1, 2, 12, 3, 12, 4], [5, 6, 7, 12, 8, 12]])
    dlm.decode(model, rows, propose=Learned(head))
    states, time, masked, _ = heard[0]
    assert states.shape == (2, 4, 32) and time.tolist() == [0, 0]
    assert masked.tolist() == [[True, False, True, False], [False, True, False, True]]
    assert heard[1][1].tolist() == [0.5, 0.5]


def test_guidance_and_plain_modules_are_refused():
    model, head = policy_and_head()
    with pytest.raises(ValueError, match="states"):
        dlm.decode(model, [1, 2], length=2, propose=Learned(head), cfg_scale=1.0)
    plain = model.forward
    with pytest.raises(ValueError, match="states"):
        dlm.decode(
            lambda input_ids: plain(input_ids),
            torch.tensor([1, 2]),
            length=2,
            propose=Learned(head),
            mask_token_id=12,
        )
