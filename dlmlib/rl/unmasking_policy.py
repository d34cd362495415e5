"""A learned unmasking order: a small head that says which position to write next."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from dlmlib.decoding.propose import Propose
from dlmlib.device import uniform
from dlmlib.errors import check
from dlmlib.model import DLMConfig
from dlmlib.model.layers import Block, rope_angles
from dlmlib.model.upstream import LLADA_NAMES

FREQUENCIES = 256  # of the sinusoidal embedding of time


class Modulation(nn.Module):
    """Layer norm whose scale and shift are linear in a condition (AdaLN)."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Float[Tensor, "B L D"], condition) -> Float[Tensor, "B L D"]:
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-4) * (1 + scale) + shift


class OrderHead(nn.Module):
    """Scores h_i of the positions of an answer, from the network's final states.

    One transformer block over the answer, modulated by time (the share of steps taken)
    and by two embeddings: is the position masked, is it in the current block. The order
    is Plackett-Luce: positions are drawn one after the other, without replacement, from
    softmax(h).

    Args:
        config: of the network whose states it reads.
    Source: LLaDOU, DCoLT (arXiv 2505.10446), section 4. Introduced in notebook 21.
    """

    def __init__(self, config: DLMConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.time = nn.Sequential(
            nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.masked, self.inside = nn.Embedding(2, width), nn.Embedding(2, width)
        self.norm_in, self.norm_out = Modulation(width), Modulation(width)
        self.block = Block(config, 0)
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)  # all positions alike, until it is trained
        nn.init.zeros_(self.score.bias)

    def forward(
        self,
        states: Float[Tensor, "B L D"],
        time: Float[Tensor, " B"],
        masked: Bool[Tensor, "B L"],
        inside: Bool[Tensor, "B L"],
    ) -> Float[Tensor, "B L"]:
        """h of every position.

        Args:
            states: of the answer's columns, after the final norm.
            time: step / steps, in [0, 1).
            masked: still to be written.
            inside: in the current block.
        """
        condition = self.time(sinusoids(time).to(states.dtype))[:, None]
        condition = condition + self.masked(masked.long()) + self.inside(inside.long())
        config = self.config
        place = torch.arange(states.shape[1], device=states.device)[None]
        rope = rope_angles(place, config.head_dim, config.rope_theta)
        x = self.block(self.norm_in(states, condition), rope, None)
        return self.score(self.norm_out(x, condition))[..., 0].float()

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: DLMConfig) -> "OrderHead":
        """The head in a folder of LLaDOU's published format.

        Raises:
            ValueError: if the folder has no such head, or one that does not fit.
        """
        theirs = {name: tensor for name, tensor in read(Path(folder), tuple(PARTS))}
        check(bool(theirs), "folder", str(folder), "a checkpoint with an order head")
        head = cls(config)
        state = {ours(name): tensor for name, tensor in theirs.items()}
        wrong = sorted(state.keys() ^ head.state_dict().keys())
        check(not wrong, "tensors of the order head", wrong, "none missing or added")
        head.load_state_dict(state)
        return head


PARTS = {
    "time_embedding.mlp": "time",
    "mask_embedding": "masked",
    "block_embedding": "inside",
    "norm_out_1": "norm_in",
    "norm_out_2": "norm_out",
    "mask_linear": "score",
    "mask_head.0": "block",
}


def ours(name: str) -> str:
    """Our name of one of LLaDOU's tensors."""
    part = next(part for part in PARTS if name.startswith(part + "."))
    rest = name.removeprefix(part + ".")
    if part == "mask_head.0":
        layer, _, leaf = rest.rpartition(".")
        rest = f"{LLADA_NAMES[layer]}.{leaf}"
    return f"{PARTS[part]}.{rest}"


def read(folder: Path, prefixes: tuple[str, ...]):
    """(name, tensor) of a folder's safetensors whose names start so."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.startswith(prefixes):
                    yield name, tensors.get_tensor(name)


def sinusoids(time: Float[Tensor, " B"]) -> Float[Tensor, "B F"]:
    """cos and sin of time at frequencies from 1 down to 1/10000."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time.float()[:, None] * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Learned(Propose):
    """An order policy that asks an `OrderHead` where to write next.

    Args:
        head: the trained head.
        generator: draws positions without replacement (Gumbel noise on h), as rollouts
            need; None takes the highest h.
    Source: LLaDOU (arXiv 2505.10446). Introduced in notebook 21.
    """

    def __init__(self, head: OrderHead, generator: torch.Generator | None = None):
        self.head, self.generator = head, generator

    def reads(self, canvas, rows):
        """The answer: see `answer_columns`."""
        answer = torch.zeros_like(canvas.fixed[rows])
        answer[:, answer_columns(~canvas.fixed)] = True
        return answer

    def score(self, logits, token, logprob, entropy, columns, generator):
        return logprob  # replaced by `order`

    def order(self, logits, canvas, rows, region):
        """h, with noise if positions are to be drawn.

        Raises:
            ValueError: for a model that gives logits but no states, or with guidance.
        """
        states, read = logits.states, self.reads(canvas, rows)
        width = self.head.config.hidden_size
        fits = states.dim() == 2 and states.shape[1] == width
        check(fits, "states", tuple(states.shape), f"[N, {width}]: no guidance")
        asked, masked = ~canvas.fixed[rows], canvas.masked[rows]
        asked, masked, inside = (
            x[read].view(len(rows), -1) for x in (asked, masked, region)
        )
        time = share_written(masked, asked)
        h = self.head(states.view(*masked.shape, -1), time, masked, inside)
        if self.generator is not None:
            u = uniform(h.shape, self.generator, h.device, torch.float64)
            h = h - (-u.log()).log()
        return h.new_zeros(read.shape).masked_scatter(read, h)


def answer_columns(asked: Bool[Tensor, "B T"]) -> slice:
    """Columns that an order head reads: from the first that any row has to write.

    Where length was appended to prompts, this is the answer. Where masks inside a text
    are filled, it also holds the given tokens behind the first of them.
    """
    return slice(int(asked.any(0).int().argmax()), None)


def share_written(masked: Bool[Tensor, "B L"], asked) -> Float[Tensor, " B"]:
    """Time in [0, 1]: the written share of the tokens that the answer asks for."""
    return 1 - masked.sum(1) / asked.sum(1).clamp_min(1)


def plackett_luce(
    score: Float[Tensor, "B L"],
    open_: Bool[Tensor, "B L"],
    rank: Int[Tensor, "B L"],
) -> Float[Tensor, "B L"]:
    """Terms of the log-probability of drawing positions in an order.

    The k-th draw is without replacement: h_k - log sum_{open, not drawn before} exp h.

    Args:
        score: h.
        open_: positions that could be drawn.
        rank: 0 for the first drawn, 1 for the next, …; -1 for those not drawn.
    Returns:
        The term of each drawn position, 0 elsewhere.
    Raises:
        ValueError: if a drawn position is not open.
    Source: DCoLT (arXiv 2505.10446), eq. 8. Introduced in notebook 21.
    """
    drawn = rank >= 0
    check(not bool((drawn & ~open_).any()), "rank", rank, "-1 where not open")
    # Left at the draw of i: what is drawn at i or later, and what is never drawn.
    late = torch.where(drawn, rank, rank.shape[1])
    left = (late[:, None, :] >= late[:, :, None]) & open_[:, None, :]  # [B, i, j]
    left = left | ~drawn[:, :, None]  # any finite sum where nothing is read
    total = score[:, None, :].masked_fill(~left, -torch.inf).logsumexp(-1)
    return (score - total).masked_fill(~drawn, 0.0)
