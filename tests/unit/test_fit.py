"""The training loop: its arithmetic, its exact resume, its several processes."""

import copy
import math
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from processes import start_two, wait_for
from torch import nn

from dlmlib.device import generator
from dlmlib.diffusion.objective import NELBO
from dlmlib.model import DiffusionLM, DLMConfig
from dlmlib.training import progress
from dlmlib.training.batches import batches_from, fresh_batches
from dlmlib.training.checkpoints import load_tensors
from dlmlib.training.fit import STATE, fit
from dlmlib.training.optimizer import FINAL_LR, adamw, learning_rate

MASK, VOCABULARY, LENGTH = 1, 12, 6


def tiny_model(seed=0):
    config = DLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        mask_token_id=MASK,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DiffusionLM(config)


class Repeating:
    """Rows of one random token: all follow from any that is seen."""

    length = LENGTH

    def batch(self, n, generator):
        token = torch.randint(2, VOCABULARY, (n, 1), generator=generator)
        return {"input_ids": token.repeat(1, LENGTH)}


def repeating_batches(rows=8):
    return fresh_batches(Repeating(), rows)


def run(model, batches=None, **options):
    options = {"steps": 6, "progress": False, **options}
    objective = options.pop("objective", NELBO(MASK))
    return fit(model, batches or repeating_batches(), objective, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def numbers(history):
    """The history without the speed, the one thing that may differ between runs."""
    return [
        {k: v for k, v in entry.items() if k != "tokens_per_second"}
        for entry in history
    ]


def test_learning_rate_is_a_line_then_half_a_cosine():
    rates = [learning_rate(step, 110, 2.0, 10) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    middle = 2.0 * (1 + FINAL_LR) / 2  # half of the cosine at step 60
    assert rates[59] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(2.0 * FINAL_LR)
    assert all(later < rate for rate, later in pairwise(rates[9:]))


def test_without_warmup_the_first_step_is_on_the_cosine():
    assert learning_rate(1, 1, 1.0, 0) == pytest.approx(FINAL_LR)
    assert 0.9 < learning_rate(1, 100, 1.0, 0) < 1.0


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = weights(model)
    optimizer = adamw(model.parameters(), weight_decay=0.1, betas=(0.9, 0.98))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, after in weights(model).items():
        factor = 1 - 0.5 * 0.1 if after.dim() >= 2 else 1.0
        assert torch.allclose(after, factor * before[name], atol=1e-7), name


def ragged_batches(generator):
    """Rows with 0 … LENGTH - 1 fixed tokens, so that tokens per row differ."""
    ids = Repeating().batch(8, generator)["input_ids"]
    fixed = torch.randint(LENGTH, (8, 1), generator=generator)
    return {"input_ids": ids, "maskable": torch.arange(LENGTH) >= fixed}


def test_two_steps_are_adamw_on_nats_per_token():
    model, reference = tiny_model(), tiny_model()
    objective, draws = NELBO(MASK), generator(3)
    options = dict(steps=2, lr=1e-2, warmup=1, clip=0.3, seed=3)
    result = run(model, ragged_batches, objective=objective, **options)
    decayed = [p for p in reference.parameters() if p.dim() > 1]
    free = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    for step, rate in enumerate([1e-2, 1e-2 * FINAL_LR]):
        noised = objective.corrupt(ragged_batches(draws), draws)
        loss = objective(reference, noised).sum() / noised["tokens"].sum()
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.3, "the clip must bite for this test to mean something"
        for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
            parameter.grad = gradient * 0.3 / norm
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert result.history[step]["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert result.history[step]["lr"] == pytest.approx(rate)
    for name, parameter in reference.named_parameters():
        assert torch.allclose(weights(model)[name], parameter, atol=2e-6), name


def test_it_learns_what_can_be_learned():
    model = tiny_model()
    result = run(model, repeating_batches(32), steps=300, lr=1e-2)
    losses = [entry["loss"] for entry in result.history]
    entropy = math.log(10) / LENGTH  # one uniform token, the others follow
    late = sum(losses[-50:]) / 50
    assert losses[0] > 2 and entropy * 0.8 < late < entropy * 1.5
    assert (result.steps, result.tokens) == (300, 300 * 32 * LENGTH)
    assert result.seconds > 0 and result.raw_state is None
    assert not model.training


def test_the_same_seed_gives_the_same_run_and_the_batches_stay_where_they_were():
    rows = Repeating().batch(10, generator(1))["input_ids"].tolist()
    batches = batches_from(Dataset.from_dict({"input_ids": rows}), 4)
    first, second, other = tiny_model(), tiny_model(), tiny_model()
    results = [run(first, batches), run(second, batches), run(other, batches, seed=1)]
    assert_same(weights(first), weights(second))
    histories = [numbers(result.history) for result in results]
    assert histories[0] == histories[1] != histories[2]
    assert len(batches.remaining) == 0


class Recorded(NELBO):
    """Keeps the weights every loss was computed with."""

    def __init__(self):
        super().__init__(MASK)
        self.seen = []

    def __call__(self, model, noised):
        self.seen.append(weights(model))
        return super().__call__(model, noised)


def test_ema_is_the_recursion_and_leaves_training_alone():
    plain, averaged, recorded = tiny_model(), tiny_model(), Recorded()
    run(plain)
    result = run(averaged, objective=recorded, ema=0.5)
    assert_same(weights(plain), {k: result.raw_state[k] for k in weights(plain)})
    path = [*recorded.seen[1:], weights(plain)]  # the weights after each step
    for name, average in recorded.seen[0].items():
        for step, after in enumerate(path, start=1):
            decay = min(0.5, step / (10 + step))
            average = decay * average + (1 - decay) * after[name]
        assert torch.allclose(weights(averaged)[name], average, atol=1e-6), name
    averaged.load_state_dict(result.raw_state)
    assert_same(weights(plain), weights(averaged))


def test_evaluate_sees_the_average_and_changes_nothing():
    seen = []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(weights(model))
        return {"size": torch.tensor(2.5)}

    plain, watched = tiny_model(), tiny_model()
    raw = run(plain, steps=5).history
    result = run(watched, steps=5, ema=0.9, evaluate=evaluate, evaluate_every=2)
    evaluated = [e["step"] for e in result.history if e.get("size") == 2.5]
    assert evaluated == [2, 4, 5]
    assert [e["loss"] for e in result.history] == [e["loss"] for e in raw]
    assert_same(seen[-1], weights(watched))
    assert not torch.equal(
        seen[-1]["model.norm.weight"], result.raw_state["model.norm.weight"]
    )


class Stop(Exception):
    """What pulls the plug in these tests."""


def stopping(batches, calls):
    """`batches` that fail at the given call, but keep their position."""

    class Stopping(type(batches)):
        left = calls

        def __call__(self, generator):
            self.left -= 1
            if self.left == 0:
                raise Stop
            return super().__call__(generator)

    stopped = copy.copy(batches)
    stopped.__class__ = Stopping
    return stopped


@pytest.mark.parametrize("stop_at", range(1, 8))
def test_interrupted_anywhere_and_resumed_equals_uninterrupted(tmp_path, stop_at):
    rows = Repeating().batch(10, generator(1))["input_ids"].tolist()
    batches = batches_from(Dataset.from_dict({"input_ids": rows}), 4)
    options = dict(steps=7, ema=0.9, save_every=2, lr=1e-2)
    options |= dict(evaluate=lambda m: {"w": m.lm_head.weight.sum()}, evaluate_every=3)
    straight, resumed = tiny_model(), tiny_model()
    expected = run(straight, batches, **options)
    options["checkpoint"] = tmp_path
    with pytest.raises(Stop):
        run(tiny_model(), stopping(batches, stop_at), **options)
    result = run(resumed, batches, **options)
    assert_same(weights(straight), weights(resumed))
    assert_same(expected.raw_state, result.raw_state)
    assert numbers(expected.history) == numbers(result.history)
    assert (expected.steps, expected.tokens) == (result.steps, result.tokens)


def test_a_finished_run_is_only_read(tmp_path):
    first, second = tiny_model(), tiny_model(seed=1)
    expected = run(first, checkpoint=tmp_path)
    result = run(second, stopping_at_once, checkpoint=tmp_path)
    assert_same(weights(first), weights(second))
    assert result.history == expected.history and result.seconds == expected.seconds


def stopping_at_once(generator):
    raise Stop


def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(tmp_path):
    run(tiny_model(), checkpoint=tmp_path, lr=1e-3)
    model = tiny_model(seed=1)
    before = weights(model)
    with pytest.raises(ValueError, match=r"'lr': 0.001.*expected.*'lr': 0.002"):
        run(model, checkpoint=tmp_path, lr=2e-3)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:-9])
    with pytest.raises(ValueError, match=STATE):
        run(model, checkpoint=tmp_path, lr=1e-3)
    assert_same(before, weights(model))


class Breaking(NELBO):
    """Returns a wrong loss, or a finite one with a wrong gradient, at one step."""

    def __init__(self, at, how):
        super().__init__(MASK)
        self.left, self.how = at, how

    def __call__(self, model, noised):
        nats = super().__call__(model, noised)
        self.left -= 1
        if self.left:
            return nats
        zero = next(model.parameters()).sum() * 0
        return nats * math.nan if self.how == "loss" else nats + zero.sqrt()


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, how):
    model = tiny_model()
    options = dict(checkpoint=tmp_path, save_every=2)
    with pytest.raises(FloatingPointError, match="step 4"):
        run(model, objective=Breaking(4, how), **options)
    assert all(p.isfinite().all() for p in model.parameters())
    _, info = load_tensors(tmp_path / STATE)
    assert info["result"]["steps"] == 2
    straight, resumed = tiny_model(), tiny_model()
    run(straight)
    run(resumed, **options)
    assert_same(weights(straight), weights(resumed))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(steps=0),
        dict(steps=2.5),
        dict(lr=-1e-3),
        dict(lr=0),
        dict(warmup=-1),
        dict(warmup=7),
        dict(weight_decay=-0.1),
        dict(betas=(0.9, 1.0)),
        dict(betas=(0.9,)),
        dict(clip=0),
        dict(ema=1.0),
        dict(ema=0),
        dict(seed=-1),
        dict(precision="fp8"),
        dict(save_every=0),
        dict(evaluate_every=0),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(wrong):
    model, (name, value) = tiny_model(), next(iter(wrong.items()))
    before = weights(model)
    with pytest.raises(ValueError) as error:
        run(model, **wrong)
    assert name in str(error.value) and "expected" in str(error.value)
    assert str(value if name != "betas" else list(value)) in str(error.value)
    assert_same(before, weights(model))


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights():
    seen = set()

    class Watching(NELBO):
        def __call__(self, model, noised):
            seen.add(model(noised["noisy_ids"]).logits.dtype)
            return super().__call__(model, noised)

    model, reference = tiny_model(), tiny_model()
    result = run(model, objective=Watching(MASK), precision="bf16")
    expected = run(reference, precision="no")
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.history[0]["loss"] == pytest.approx(
        expected.history[0]["loss"], rel=0.02
    )


def test_the_bar_shows_loss_and_speed_and_can_be_silent(capsys):
    run(tiny_model())
    assert capsys.readouterr() == ("", "")
    run(tiny_model(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in ("6/6", "loss", "tokens/s"))


def test_a_stored_notebook_keeps_one_line():
    nbclient, v4 = pytest.importorskip("nbclient"), pytest.importorskip("nbformat.v4")
    cell = f"""import runpy
make_bar = runpy.run_path({progress.__file__!r})["progress_bar"]  # without torch
with make_bar(3) as bar:
    for _ in range(3):
        bar.set_postfix_str("loss 1.0")
        bar.update()"""
    notebook = v4.new_notebook(cells=[v4.new_code_cell(cell)])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data" and list(output.data) == ["text/plain"]
    assert "3/3" in output.data["text/plain"] and "loss" in output.data["text/plain"]
    assert "widgets" not in notebook.metadata


def test_epochs_hold_every_row_once():
    ids = torch.arange(10)[:, None].repeat(1, 3)
    maskable = [[False, True, True]] * 10
    columns = {"input_ids": ids.tolist(), "maskable": maskable, "text": ["x"] * 10}
    batches, draws = batches_from(Dataset.from_dict(columns), 4), generator(0)
    drawn = [batches(draws) for _ in range(5)]
    assert all(batch.keys() == {"input_ids", "maskable"} for batch in drawn)
    assert drawn[0]["maskable"].tolist() == maskable[:4]
    rows = torch.cat([batch["input_ids"] for batch in drawn])
    assert (rows == rows[:, :1]).all()
    first, second = rows[:10, 0].tolist(), rows[10:, 0].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != list(range(10))


@pytest.mark.parametrize(
    ("columns", "batch_size", "match"),
    [
        ({"input_ids": [[1]] * 3}, 4, r"batch_size=4.*\[1, 3\]"),
        ({"input_ids": [[1]] * 3}, 0, r"batch_size=0.*\[1, 3\]"),
        ({"tokens": [[1]] * 3}, 1, "input_ids"),
        ({"input_ids": [[1], [1, 2]]}, 1, r"\[1, 2\].*pad"),
    ],
)
def test_a_dataset_that_makes_no_batches_is_refused(columns, batch_size, match):
    with pytest.raises(ValueError, match=match):
        batches_from(Dataset.from_dict(columns), batch_size)


def test_fresh_batches_need_a_row():
    with pytest.raises(ValueError, match=r"batch_size=0.*>= 1"):
        fresh_batches(SimpleNamespace(), 0)


WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
from test_fit import Repeating, run, tiny_model
from dlmlib.training.batches import fresh_batches
from dlmlib.training.checkpoints import save_tensors
rank = int(os.environ["RANK"])
model = tiny_model(seed=rank)  # the first process's weights must reach the second
folder = {folder!r}
result = run(model, fresh_batches(Repeating(), 5), **{options!r}, checkpoint=folder)
info = dict(losses=[entry["loss"] for entry in result.history], tokens=result.tokens)
save_tensors(f"{{folder}}/rank{{rank}}.safetensors", model.state_dict(), info)
"""


def test_two_processes_do_what_one_does(tmp_path):
    # Adam ignores a factor on all gradients; a clip between their norms does not.
    options = dict(steps=5, lr=1e-2, ema=0.9, clip=2.5, save_every=2)
    tests = os.path.dirname(__file__)
    script = WORKER.format(tests=tests, folder=str(tmp_path), options=options)
    processes = start_two(script)
    model = tiny_model(seed=0)
    result = run(model, repeating_batches(5), **options)
    wait_for(processes)
    losses = [entry["loss"] for entry in result.history]
    for rank in range(2):
        found, info = load_tensors(tmp_path / f"rank{rank}.safetensors")
        assert info["losses"] == pytest.approx(losses, abs=1e-6)
        assert info["tokens"] == result.tokens
        for name, tensor in model.state_dict().items():
            assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
    _, state = load_tensors(tmp_path / STATE)
    assert state["result"]["steps"] == 5


def test_fewer_rows_than_processes_is_refused(monkeypatch):
    from dlmlib.training import run as run_module

    def two_processes(**_):
        return SimpleNamespace(process_index=0, num_processes=2, device="cpu")

    monkeypatch.setattr(run_module, "PartialState", two_processes)
    monkeypatch.setattr(run_module, "broadcast", lambda tensor: tensor)
    with pytest.raises(ValueError, match="rows in a batch=1: expected at least 2"):
        training_run = run_module.Run(
            tiny_model(),
            repeating_batches(1),
            NELBO(MASK),
            dict(seed=0, weight_decay=0, betas=(0.9, 0.98), ema=None, precision="no"),
        )
        training_run.backward()
