"""`python -m dlmlib.bench`: speed and memory of the decoders, side by side.

All modes share one process, one set of random weights and one prompt. They take turns
(A B C A B C …), so that a machine that slows down slows all of them. One JSON a run.

With --sweep NAME=V1,V2,… all modes run at each of the values, one JSON in all. A longer
answer gets more steps: the tokens per step stay the same. With --step only a cached
block step is timed, against reading the weights once.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModel

from dlmlib.decoding import DualCache, PrefixCache, Threshold, decode
from dlmlib.device import generator, pick_device
from dlmlib.errors import check
from dlmlib.gauges import Timer, extra_memory
from dlmlib.model import DiffusionLM, DLMConfig
from dlmlib.roofline import measure_step

# A mode is one of these, or several joined by "+", such as dual+threshold.
PARTS = {
    "lossless": {},
    "full": {},  # lossless, but the output layer runs for every position
    "prefix": {"reuse": PrefixCache},
    "dual": {"reuse": DualCache},
    "threshold": {"commit": Threshold},
}
EXACT = ("lossless", "full")  # these must give the same tokens
SWEPT = ("answer", "batch", "prompt", "block")
SIZES = dict(width=512, layers=8, heads=8, inner=1536, vocab=126464, prompt=128)
SIZES |= dict(answer=128, block=32, steps=32, batch=1, repeats=3)
TINY = dict(width=32, layers=2, heads=2, inner=48, vocab=61, prompt=8)
TINY |= dict(answer=16, block=8, steps=8, repeats=2)


@dataclass
class Mode:
    """One way to decode, and what its runs gave."""

    name: str
    run: Callable[[], Int[Tensor, "B T"]]
    tokens: list[Tensor] = field(default_factory=list)  # of every run
    seconds: list[float] = field(default_factory=list)  # of every timed run
    forwards: int = 0  # calls of the network in one run; 0 where nobody counted
    peak_extra_bytes: int = 0


def random_model(options, device: torch.device, dtype: torch.dtype) -> DiffusionLM:
    """A network of the given sizes; its last token id is [MASK]."""
    config = DLMConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=options.inner,
        mask_token_id=options.vocab - 1,
    )
    with torch.random.fork_rng(), device:  # transformers draws from the global one
        torch.manual_seed(0)
        return AutoModel.from_config(config, dtype=dtype).eval()


def own_mode(name: str, model: DiffusionLM, prompt: Tensor, options) -> Mode:
    """One of this library's modes; ValueError if a part of its name is unknown."""
    parts, chosen = name.split("+"), {}
    for part in parts:
        check(part in PARTS, "modes", name, f"{sorted(PARTS)}, or some joined by '+'")
        chosen |= PARTS[part]
    fixed = {"length": options.answer, "block_length": options.block}
    fixed["mask_token_id"] = model.config.mask_token_id
    if "commit" not in chosen:
        fixed["steps"] = options.steps
    called = (lambda input_ids: model(input_ids)) if "full" in parts else model

    def run() -> Tensor:
        policies = {argument: policy() for argument, policy in chosen.items()}
        return decode(called, prompt, **fixed, **policies).sequences

    return Mode(name, run)


def peer_mode(source: str, model: DiffusionLM, prompt: Tensor, options) -> Mode:
    """FILE:FUNCTION, called as LLaDA's `generate`; ValueError if there is none.

    It may return its number of forwards after the tokens, as Fast-dLLM's programs do.
    Those of our network are counted anyway.
    """
    path, _, function = source.rpartition(":")
    file = Path(path)
    check(file.is_file(), "peer", source, "FILE:FUNCTION, where the file exists")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generate = getattr(module, function, None)
    check(callable(generate), "peer", source, f"a function that {file.name} defines")
    fixed = {"steps": options.steps, "gen_length": options.answer, "temperature": 0.0}
    fixed |= {"block_length": options.block, "mask_id": model.config.mask_token_id}

    @torch.no_grad()
    def run() -> Tensor:
        out = generate(model, prompt, **fixed)
        if isinstance(out, tuple):
            out, mode.forwards = out
        return out

    mode = Mode(f"{file.stem}:{function}", run)
    return mode


def rehearse(mode: Mode, model, device: torch.device) -> None:
    """One untimed run, which warms up, counts forwards and measures memory."""
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    mode.peak_extra_bytes = extra_memory(mode.run, device)
    mode.forwards = len(calls) or mode.forwards
    hook.remove()


def interleave(modes: list[Mode], repeats: int, device: torch.device) -> None:
    """Time every mode `repeats` times, in turns."""
    for _ in range(repeats):
        for mode in modes:
            with Timer(device) as timer:
                tokens = mode.run()
            mode.seconds.append(timer.seconds)
            mode.tokens.append(tokens.cpu())


def same_tokens(mode: Mode, other: Mode) -> bool:
    """Whether all runs of both modes gave the same tokens."""
    return all(torch.equal(t, other.tokens[0]) for t in mode.tokens + other.tokens)


def summary(mode: Mode, modes: list[Mode], answer: int) -> dict:
    """What the JSON says about one mode; the ratio is against the first."""
    others = [other for other in modes if other is not mode]
    return {
        "name": mode.name,
        "seconds": mode.seconds,
        "median": median(mode.seconds),
        "spread": max(mode.seconds) - min(mode.seconds),
        "ratio": median(mode.seconds) / median(modes[0].seconds),
        "forwards": mode.forwards or None,
        "tokens_per_forward": answer / mode.forwards if mode.forwards else None,
        "peak_extra_bytes": mode.peak_extra_bytes,
        "same_tokens_as": [m.name for m in others if same_tokens(m, mode)],
    }


def compare(options, model: DiffusionLM) -> dict:
    """Run all modes at one set of sizes.

    Returns:
        modes: their summaries. exact_modes_agree: whether those of `EXACT` gave the
        same tokens, None unless several of them ran.
    """
    device, vocab = model.device, model.config.vocab_size
    shape = options.batch, options.prompt  # the draw leaves out the last id, [MASK]
    prompt = torch.randint(vocab - 1, shape, generator=generator(0)).to(device)
    modes = [own_mode(m, model, prompt, options) for m in options.modes.split(",")]
    modes += [peer_mode(source, model, prompt, options) for source in options.peer]
    for mode in modes:
        rehearse(mode, model, device)
    interleave(modes, options.repeats, device)
    exact = [mode for mode in modes if mode.name in EXACT]
    agree = all(same_tokens(mode, exact[0]) for mode in exact)
    return {
        "modes": [summary(mode, modes, options.answer) for mode in modes],
        "exact_modes_agree": agree if len(exact) > 1 else None,
    }


def swept(options, text: str) -> list[argparse.Namespace]:
    """The options at every value of NAME=V1,V2,…

    Raises:
        ValueError: unless NAME is one of `SWEPT` and the values are integers >= 1.
    """
    name, _, values = text.partition("=")
    whole = all(value.isdigit() and int(value) for value in values.split(","))
    check(name in SWEPT and whole, "sweep", text, f"NAME=V1,V2,… with NAME in {SWEPT}")
    runs = []
    for value in map(int, values.split(",")):
        changed = {name: value}
        if name == "answer":  # the same number of tokens a step
            changed["steps"] = max(1, options.steps * value // options.answer)
        runs.append(argparse.Namespace(**{**vars(options), **changed}))
    return runs


def measure(options) -> dict:
    """Run all modes; returns what the JSON holds. Introduced in notebook 08."""
    choice = pick_device(options.device)
    device, dtype = choice.device, getattr(torch, options.dtype or "", choice.dtype)
    sizes = {name: getattr(options, name) for name in SIZES}
    for name, value in sizes.items():
        check(value >= 1, name, value, ">= 1")
    runs = [run for text in options.sweep for run in swept(options, text)]
    model = random_model(options, device, dtype)
    machine = {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"machine": machine, "arguments": sizes}
    if options.step:
        start, columns = options.prompt, options.prompt + options.answer
        ids = torch.zeros(options.batch, columns, dtype=torch.long, device=device)
        stop = start + options.block
        return result | {"step": measure_step(model, ids, start, stop, options.repeats)}
    if not runs:
        return result | compare(options, model)
    points = [
        {name: getattr(run, name) for name in (*SWEPT, "steps")} | compare(run, model)
        for run in runs
    ]
    return result | {"points": points}


def write(path: Path, result: dict) -> None:
    """Write the JSON to a temporary file and rename it: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def table(modes: list[dict]) -> str:
    """The modes as a small table."""
    heads = "median s", "spread", "x first", "forwards", "tokens/call", "peak MB"
    lines = [f"{'mode':24}" + "".join(f"{head:>12}" for head in heads)]
    keys = "median", "spread", "ratio", "forwards", "tokens_per_forward"
    for row in modes:
        values = *(row[key] for key in keys), row["peak_extra_bytes"] / 1e6
        shown = ("?" if value is None else f"{value:.4g}" for value in values)
        same = " = " + ", ".join(row["same_tokens_as"]) if row["same_tokens_as"] else ""
        numbers = "".join(f"{value:>12}" for value in shown)
        lines.append(f"{row['name']:24}{numbers}{same}")
    return "\n".join(lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; --tiny sets other defaults."""
    parser = argparse.ArgumentParser("dlmlib.bench", description=__doc__)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="cpu, cuda or mps; default: the best here")
    parser.add_argument("--modes", default="lossless,prefix,dual,threshold")
    peer = "FILE:FUNCTION called as LLaDA's generate on the same weights; repeatable"
    parser.add_argument("--peer", action="append", default=[], help=peer)
    sweep = f"NAME=V1,V2,… with NAME in {', '.join(SWEPT)}; repeatable"
    parser.add_argument("--sweep", action="append", default=[], help=sweep)
    step = "time a cached block step against reading the weights"
    parser.add_argument("--step", action="store_true", help=step)
    parser.add_argument("--out", help="default: data/results/bench_<device>.json")
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial run")
    options = parser.parse_args(arguments)
    if options.tiny:
        parser.set_defaults(**TINY)
        options = parser.parse_args(arguments)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables and write the JSON; 1 if exact modes differ."""
    options = parsed(arguments)
    result = measure(options)
    device = result["machine"]["device"]
    write(Path(options.out or f"data/results/bench_{device}.json"), result)
    if options.step:
        print(json.dumps(result["step"], indent=1))
        return 0
    points = result.get("points", [result])
    for point in points:
        sizes = [f"{name} {point[name]}" for name in SWEPT if name in point]
        print(*([" · ".join(sizes)] if sizes else []), table(point["modes"]), sep="\n")
    return int(any(point["exact_modes_agree"] is False for point in points))


if __name__ == "__main__":
    sys.exit(main())
