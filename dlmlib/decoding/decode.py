"""The decoding loop. Every published decoder is this loop with other policies."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils import ModelOutput

from dlmlib.decoding import propose as proposing
from dlmlib.decoding.canvas import Canvas
from dlmlib.decoding.commit import Commit, Even
from dlmlib.decoding.reuse import Reuse, View
from dlmlib.decoding.revise import Remask
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
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    attention_mask: Tensor | None = None,
    mask_token_id: int | None = None,
    generator: torch.Generator | None = None,
    trace: bool = False,
    streamer=None,
) -> DecodeOutput:
    """Fill every [MASK]: `length` new positions and any mask inside the prompt.

    While some position is open: where may we write, what would we write, how many do
    we keep, do we take any back. A row that is done is left out of the forward, and so
    is a row whose schedule writes nothing at this step.

    Args:
        model: any module that maps input_ids to `.logits`, logits[:, i] about token i.
        prompt_ids: [P] or [B, P] tensor, or a list of rows of any lengths.
        length: positions to append.
        steps: shorthand for commit=Even(steps); without it, one token a step.
        block_length: shorthand for where=Blocks(block_length).
        where: Everywhere() (default) or Blocks(length).
        propose: order policy or its name: confidence, margin, entropy, random,
            left_to_right, right_to_left.
        commit: Even, Scheduled, Threshold, Factor or EntropyBound.
        revise: Remask(…) or None.
        reuse: PrefixCache(), DualCache() or None, which computes everything anew.
        temperature: of the token draw, >= 0; 0 takes the most probable.
        cfg_scale: classifier-free guidance w: u + (w + 1)(c - u), u with the prompt
            masked; 0 is none.
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
    commit = one_of("commit", commit, "steps", steps, Even)
    commit = commit or Commit()  # one token a step
    propose, phases = proposing.named(propose), where.phases(canvas)
    check_budget(commit, revise, phases)
    run = Run(canvas, Recorder(canvas) if trace else None)
    forward = Forward(model, canvas, reuse, cfg_scale)
    if streamer is not None:
        check(len(canvas.ids) == 1, "streamer", "given", "a batch of one row")
        begin = int(canvas.masked[0].nonzero()[0])  # the answer, infilling included
        streamer.put(canvas.ids[:, :begin].cpu())

    while (open_ := where(canvas)).any():
        count = open_.sum(1)
        back, held = take_back(revise, commit, where, canvas, phases, generator)
        quota = commit.quota(count, canvas, phases, generator).masked_fill(held, 0)
        quota = (quota + back.sum(1)).minimum(count)
        canvas.phase_step += (count > 0) & ~held
        canvas.held += held
        rows = (quota > 0).nonzero()[:, 0]
        if len(rows) == 0:
            continue  # a step that writes nothing is not paid for
        open_, back, columns = open_[rows], back[rows], open_[rows].nonzero()[:, 1]
        logits = forward(rows, open_)
        proposal = proposing.proposals(
            propose,
            logits,
            columns,
            canvas.mask_token_id,
            temperature,
            commit.needs_entropy,
            generator,
        ).spread(open_)
        keep = commit(proposal, open_, quota[rows])
        canvas.write(rows, keep, proposal.token, proposal.logprob)
        canvas.erase(rows, back)
        run.count(rows, open_, proposal, keep, back, forward)
        if streamer is not None and hasattr(streamer, "put_draft"):
            streamer.put_draft(canvas.ids[:, begin:].cpu())

    if streamer is not None:
        streamer.put(canvas.ids[:, begin:].cpu())
        streamer.end()
    return run.output()


class Forward:
    """The network as the loop calls it: what may be reused, and guidance.

    Classifier-free guidance: u + (w + 1)(c - u), where u comes from the canvas with
    every prompt token masked. Both are computed in one call on twice the rows, and
    counted as two forwards.

    Source: LLaDA's generate; Nie et al. (arXiv 2410.18514). Introduced in notebook 06.
    """

    def __init__(self, model, canvas: Canvas, reuse: Reuse | None, cfg_scale: float):
        self.model, self.canvas, self.cfg_scale = model, canvas, cfg_scale
        self.memory = (reuse or Reuse()).begin(model)
        self.valid = None if bool(canvas.valid.all()) else canvas.valid
        self.each = 2 if cfg_scale else 1  # forwards a row takes part in

    @property
    def calls(self) -> int:
        """Forwards of the last step."""
        return self.memory.calls * self.each

    def __call__(
        self, rows: Int[Tensor, " b"], open_: Bool[Tensor, "b T"]
    ) -> Float[Tensor, "N V"]:
        """Logits of the open positions of the active rows."""
        canvas, valid = self.canvas, self.valid
        view = View(canvas.ids, valid, canvas.phase)
        if not self.cfg_scale:
            return self.memory(self.model, view, rows, open_)
        given = canvas.fixed & canvas.valid
        blind = canvas.ids.masked_fill(given, canvas.mask_token_id)
        both = View(
            torch.cat([canvas.ids, blind]),
            None if valid is None else torch.cat([valid, valid]),
            torch.cat([canvas.phase, canvas.phase]),
        )
        twice = torch.cat([rows, rows + len(canvas.ids)])
        logits = self.memory(self.model, both, twice, torch.cat([open_, open_]))
        told, untold = logits.chunk(2)
        guided = untold + (self.cfg_scale + 1) * (told - untold)
        return guided.masked_fill(guided.isnan(), -torch.inf)  # impossible stays so


def take_back(
    revise: Remask | None, commit: Commit, where, canvas: Canvas, phases: int, generator
) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, " B"]]:
    """Positions to mask again, and rows whose schedule stands still; none by default.

    Only tokens written in the row's current phase can be taken back.
    """
    none = torch.zeros_like(canvas.fixed), torch.zeros_like(canvas.phase).bool()
    if revise is None:
        return none
    budget = commit.steps_in_phase(canvas.phase, phases)
    if budget is None:
        budget = torch.full_like(canvas.phase, revise.steps)
    written = where.region(canvas) & ~canvas.fixed & ~canvas.masked
    return revise(canvas, written, budget, generator)


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
        self.row_forwards[rows] += forward.each
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


def check_budget(commit: Commit, revise: Remask | None, phases: int) -> None:
    """Every block needs a step, and remasking needs to know when to stop."""
    if commit.steps is not None:
        check(
            commit.steps >= phases, "steps", commit.steps, f">= {phases}, one a block"
        )
    elif revise is not None:
        check(
            revise.steps is not None,
            "revise.steps",
            revise.steps,
            "an integer >= 1 with an adaptive commit",
        )


def check_vocabulary(model, canvas: Canvas) -> None:
    """Refuse token ids that the model's embedding does not have."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None:
        return
    low, high = int(canvas.ids.min()), int(canvas.ids.max())
    wrong = low if low < 0 else high
    check(low >= 0 and high < size, "prompt_ids", wrong, f"token ids in 0 … {size - 1}")
