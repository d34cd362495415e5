"""A training run: everything a step changes, and so everything a resume restores."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

from dlmlib.device import generator, pick_device
from dlmlib.errors import check
from dlmlib.training.checkpoints import load_tensors, match_tensors, save_tensors
from dlmlib.training.optimizer import adamw, learning_rate

Batch = dict[str, Tensor]
SMOOTH = 50  # steps averaged in the loss that the bar shows


@dataclass
class FitResult:
    """What a training run leaves behind, beside the trained model.

    history: one dict a step: step (from 1), loss [nats per token, of the global batch],
        lr, tokens_per_second, and what `evaluate` returned.
    steps, tokens: updates made and maskable tokens seen [in all].
    seconds: time spent in the steps, without evaluation and saves, over all resumes.
    raw_state: the last weights, if the model was left with their moving average.
    """

    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    raw_state: Batch | None = field(default=None, repr=False)


class Run:
    """Everything that changes while training, and so everything a resume restores."""

    def __init__(self, model, batches, objective, settings):
        self.state = PartialState(cpu=pick_device().device.type == "cpu")
        if self.state.num_processes > 1:
            model.to(self.state.device)
        self.device = next(model.parameters()).device
        self.model, self.objective, self.settings = model, objective, settings
        self.batches = copy.copy(batches)  # the caller's stays at its own position
        self.generator = generator(settings["seed"])
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.load({n: broadcast(p.detach()) for n, p in self.parameters.items()})
        self.optimizer = adamw(
            self.parameters.values(), settings["weight_decay"], tuple(settings["betas"])
        )
        self.ema = self.weights() if settings["ema"] is not None else None
        self.bf16 = settings["precision"] == "bf16"
        self.result = FitResult()

    def step(self, step: int) -> dict[str, float]:
        """One update; returns its line of the history."""
        started, settings = time.perf_counter(), self.settings
        lr = learning_rate(step, settings["steps"], settings["lr"], settings["warmup"])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens, loss, norm = self.backward()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm}, expected finite "
                f"numbers; the model and the last checkpoint are from before it: try a "
                f"smaller lr than {settings['lr']} or a longer warm-up"
            )
        self.optimizer.step()
        self.average(step)
        seconds = time.perf_counter() - started
        speed = {"tokens_per_second": tokens / seconds}
        entry = {"step": step, "loss": loss, "lr": lr, **speed}
        result = self.result
        result.history.append(entry)
        result.steps, result.tokens = step, result.tokens + tokens
        result.seconds += seconds
        return entry

    def backward(self) -> tuple[int, float, float]:
        """Gradient of the global loss; tokens, loss, and norm before clipping."""
        self.model.train()
        noised = self.objective.corrupt(self.batches(self.generator), self.generator)
        tokens = int(noised["tokens"].sum())
        rank, world = self.state.process_index, self.state.num_processes
        rows = len(noised["tokens"])
        check(
            rows >= world, "rows in a batch", rows, f"at least {world}, one a process"
        )
        mine = {name: t[rank::world].to(self.device) for name, t in noised.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.objective(self.model, mine).sum() / tokens
        self.optimizer.zero_grad()
        loss.backward()
        if world > 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad = reduce(parameter.grad, "sum")
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings["clip"])
        return tokens, reduce(loss.detach(), "sum").item(), norm.item()

    @torch.no_grad()
    def average(self, step: int) -> None:
        """average += (1 - decay) (weights - average), with a smaller decay at first."""
        if self.ema is None:
            return
        decay = min(self.settings["ema"], step / (10 + step))  # forget the random start
        for name, parameter in self.parameters.items():
            self.ema[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def evaluate(self, evaluate: Callable) -> dict[str, float]:
        """What `evaluate` says about the weights, or about their average."""
        self.model.eval()
        last = self.weights()
        self.load(self.ema or last)
        try:
            return {name: float(x) for name, x in evaluate(self.model).items()}
        finally:
            self.load(last)

    def summary(self) -> str:
        """Mean loss of the last steps, and the speed so far."""
        recent = [entry["loss"] for entry in self.result.history[-SMOOTH:]]
        speed = self.result.tokens / self.result.seconds
        return f"loss {sum(recent) / len(recent):.3f}, {speed:,.0f} tokens/s"

    def finish(self) -> FitResult:
        """Leave the model in evaluation mode, with the averaged weights if any."""
        self.model.eval()
        if self.ema is not None:
            state = self.model.state_dict()
            self.result.raw_state = {n: t.clone() for n, t in state.items()}
            self.load(self.ema)
        return self.result

    def weights(self) -> Batch:
        return {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, weights: Batch) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def save(self, path: Path) -> None:
        """Write all of this to one file, from one process; frozen weights stay out."""
        moments = {n: self.optimizer.state[p] for n, p in self.parameters.items()}
        tensors = {
            **_prefixed("model", self.weights()),
            **_prefixed("ema", self.ema or {}),
            **_prefixed("batches", self.position()),
            "generator": self.generator.get_state(),
        }
        for name, state in moments.items():
            tensors |= _prefixed(f"adam.{name}", state)
        if self.state.is_main_process:
            info = {"settings": self.settings, "result": vars(self.result)}
            save_tensors(path, tensors, info)
        self.state.wait_for_everyone()

    def position(self) -> Batch:
        """Where the batches stand, unless the generator alone decides them."""
        state = getattr(self.batches, "state_dict", None)
        return state() if state is not None else {}

    def resume(self, path: Path) -> None:
        """Continue from `path` if it exists; if it is another run's, change nothing."""
        if not path.exists():
            return
        tensors, info = load_tensors(path)
        found = info.get("settings", {})
        differ = [k for k, v in self.settings.items() if found.get(k) != v]
        if differ:
            theirs = {name: found.get(name) for name in differ}
            ours = {name: self.settings[name] for name in differ}
            raise ValueError(
                f"{path}: a run with {theirs}, expected {ours}; give the same "
                "arguments, or another checkpoint folder to another run"
            )
        weights = _under("model", tensors)
        match_tensors(path, weights, self.parameters)
        self.load(weights)
        self.generator.set_state(tensors["generator"])
        if self.ema is not None:
            self.ema = {n: t.to(self.device) for n, t in _under("ema", tensors).items()}
        for name, parameter in self.parameters.items():
            state = _under(f"adam.{name}", tensors)
            self.optimizer.state[parameter] = {
                key: tensor.to(self.device) for key, tensor in state.items()
            }
        if hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(_under("batches", tensors))
        self.result = FitResult(**info["result"])


def _prefixed(prefix: str, tensors: Batch) -> Batch:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Batch) -> Batch:
    start = prefix + "."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
