"""The decoding loop. Every published decoder is this loop with other policies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.utils import ModelOutput

from dlmlib.decoding import propose as proposing
from dlmlib.decoding.canvas import Canvas
from dlmlib.decoding.commit import Commit, Even
from dlmlib.decoding.reuse import Forward, Reuse
from dlmlib.decoding.revise import Remask
from dlmlib.decoding.step import Policies, budget, check_budget, step
from dlmlib.decoding.stop import EarlyCommit
from dlmlib.decoding.trace import Recorder, Trace
from dlmlib.decoding.where import Blocks, Everywhere
from dlmlib.errors import check
from dlmlib.model.call import mask_token_of


@dataclass
class DecodeOutput(ModelOutput):
    """What `decode` returns.

    sequences: [B, P + length], prompt included, padding on the left.
    forwards: calls of the network; guided steps cost two.
    tokens_per_forward: [B], tokens written in a row per forward it took part in.
    trace: what happened, if asked for.
    """

    sequences: Tensor | None = None
    forwards: int | None = None
    tokens_per_forward: Tensor | None = None
    trace: Trace | None = None


@torch.no_grad()
def decode(
    model,
    prompt_ids,
    *,
    length: int = 0,
    steps: int | None = None,
    block_length: int | None = None,
    where: Everywhere | Blocks | None = None,
    propose: str | proposing.Propose = "confidence",
    commit: Commit | None = None,
    revise: Remask | None = None,
    reuse: Reuse | None = None,
    stop: EarlyCommit | None = None,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    suppress_tokens: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    mask_token_id: int | None = None,
    generator: torch.Generator | None = None,
    trace: bool = False,
    streamer=None,
) -> DecodeOutput:
    """Fill every [MASK]: `length` new positions and any mask inside the prompt.

    While some position is open: where may we write, what would we write, how many do
    we keep, do we take any back, may we stop, and what may we reuse. A row that is done
    is left out of the forward, and so is a row whose schedule writes nothing.

    Args:
        model: any module that maps input_ids to `.logits`, logits[:, i] about token i.
        prompt_ids: [P] or [B, P] tensor, or a list of rows of any lengths.
        length: positions to append.
        steps: shorthand for commit=Even(steps); without it, one token a step.
        block_length: shorthand for where=Blocks(block_length).
        where: Everywhere() (default), Blocks(length) or Streams(ranges, summary).
        propose: order policy or its name: confidence, margin, entropy, random,
            left_to_right, right_to_left.
        commit: Even, Scheduled, Threshold, Factor or EntropyBound.
        revise: Remask(…) or None.
        reuse: PrefixCache(), DualCache(), Speculate(depth, cache), or None for nothing.
        stop: EarlyCommit(…) or None.
        temperature: of the token draw, >= 0; 0 takes the most probable.
        cfg_scale: classifier-free guidance w: u + (w + 1)(c - u), u with the prompt
            masked; 0 is none.
        suppress_tokens: ids that are never written and have no share in any
            probability, such as the end of the text. To write them, but after all
            others, use propose=Confidence(last=…).
        attention_mask: [B, P], 0 on left padding.
        mask_token_id: default the model's own.
        generator: source of every draw; None takes torch's global one.
        trace: keep a `Trace`.
        streamer: transformers' protocol: put(prompt), put_draft(canvas) a step,
            put(answer), end(). One row only.
    Returns:
        `DecodeOutput`. Rows are independent: greedy decoding of a row does not depend
        on its neighbours, and sampled rows have the same distribution alone.
    Raises:
        ValueError: for arguments that contradict each other or leave their range.
    Introduced in notebook 03.
    """
    check(temperature >= 0, "temperature", temperature, ">= 0")
    check(cfg_scale >= 0, "cfg_scale", cfg_scale, ">= 0")
    canvas = Canvas.start(
        prompt_ids,
        length,
        mask_token_of(model, mask_token_id),
        attention_mask,
        getattr(model, "device", None),
    )
    check_vocabulary(model, canvas)
    where = one_of("where", where, "block_length", block_length, Blocks) or Everywhere()
    commit = one_of("commit", commit, "steps", steps, Even) or Commit()
    policies = Policies(
        where,
        proposing.named(propose),
        commit,
        revise,
        stop,
        temperature,
        generator,
        suppressed(suppress_tokens, canvas),
    )
    check_budget(policies, canvas)
    forward = Forward(model, canvas, reuse, cfg_scale)
    run = Run(canvas, Recorder(canvas) if trace else None)
    stream = Stream(streamer, canvas)

    while (open_ := where(canvas)).any():
        quota, back = budget(policies, canvas, open_)
        rows = (quota > 0).nonzero()[:, 0]
        if len(rows) == 0:
            continue  # a step that writes nothing is not paid for
        proposal, keep, back = step(
            policies, forward, canvas, rows, open_[rows], quota[rows], back[rows]
        )
        canvas.write(rows, keep, proposal.token, proposal.logprob)
        canvas.erase(rows, back)
        run.count(rows, open_[rows] | keep, proposal, keep, back, forward)
        stream.draft()
    stream.end()
    return run.output()


class Stream:
    """Shows a running decode through transformers' streamer protocol, if given one."""

    def __init__(self, streamer, canvas: Canvas):
        self.streamer, self.canvas = streamer, canvas
        if streamer is not None:
            check(len(canvas.ids) == 1, "streamer", "given", "a batch of one row")
            self.begin = int(canvas.masked[0].nonzero()[0])  # infilling included
            streamer.put(canvas.ids[:, : self.begin].cpu())

    def draft(self) -> None:
        """The answer so far."""
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(self.canvas.ids[:, self.begin :].cpu())

    def end(self) -> None:
        """The answer."""
        if self.streamer is not None:
            self.streamer.put(self.canvas.ids[:, self.begin :].cpu())
            self.streamer.end()


@dataclass
class Run:
    """Counts what a decode costs and, if asked, records it."""

    canvas: Canvas
    recorder: Recorder | None
    forwards: int = 0

    def __post_init__(self):
        self.row_forwards = torch.zeros_like(self.canvas.phase)
        self.row_tokens = torch.zeros_like(self.canvas.phase)

    def count(self, rows: Int[Tensor, " b"], open_, proposal, keep, back, forward):
        """Add one step of the active rows."""
        self.forwards += forward.calls
        self.row_forwards[rows] += forward.paid(rows)
        self.row_tokens[rows] += keep.sum(1)
        if self.recorder is not None:
            self.recorder.add(rows, open_, proposal, keep, back)

    def output(self) -> DecodeOutput:
        """The result so far."""
        return DecodeOutput(
            sequences=self.canvas.ids,
            forwards=self.forwards,
            tokens_per_forward=self.row_tokens / self.row_forwards.clamp_min(1),
            trace=self.recorder.finish() if self.recorder is not None else None,
        )


def one_of(name: str, policy, shorthand: str, value, build):
    """The policy, or the one its shorthand builds; both at once is an error."""
    if value is None:
        return policy
    check(policy is None, shorthand, value, f"None, since {name} is given")
    return build(value)


def suppressed(
    tokens: Sequence[int] | None, canvas: Canvas
) -> Int[Tensor, " n"] | None:
    """The tokens to suppress as a tensor; None for none."""
    if tokens is None or len(tokens) == 0:
        return None
    ids = torch.as_tensor(tokens, device=canvas.ids.device)
    whole = not ids.is_floating_point() and bool((ids >= 0).all())
    check(whole, "suppress_tokens", tokens, "token ids >= 0")
    return ids.long()


def check_vocabulary(model, canvas: Canvas) -> None:
    """Refuse token ids that the model's embedding does not have."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None:
        return
    low, high = int(canvas.ids.min()), int(canvas.ids.max())
    wrong = low if low < 0 else high
    check(low >= 0 and high < size, "prompt_ids", wrong, f"token ids in 0 … {size - 1}")
