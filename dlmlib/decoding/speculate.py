"""Compute the next canvases before they are reached; lossless by construction."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.reuse import Reuse, View
from dlmlib.errors import check
from dlmlib.model.call import logits_at


class Speculate(Reuse):
    """Draft and verify with the model itself.

    The last logits say what will probably be written next. So a forward computes, as
    extra rows, the canvas as it is now and `depth` drafts of what it may become. When
    the decoder then arrives at one of these canvases, its logits are there already and
    the step costs no forward; when it arrives elsewhere, the drafts are dropped. The
    logits are always those of the true canvas, so the answer is the one without
    drafts, for every order, commit rule and temperature.

    A forward becomes 1 + depth times as wide. It pays where a forward of few rows is
    bound by reading the weights, as on a GPU.

    Args:
        depth: number of drafts, >= 1.
    Raises:
        ValueError: if depth < 1.
    Source: the idea of FreeDave (arXiv 2510.00294). Introduced in notebook 08.
    """

    def __init__(self, depth: int = 4):
        whole = isinstance(depth, int) and depth >= 1
        check(whole, "depth", depth, "an integer >= 1")
        self.depth = depth

    def begin(self, model) -> "Drafts":
        """No drafts yet."""
        return Drafts(self.depth)


class Drafts:
    """The canvases that were computed ahead in one run, and their logits.

    Fields, with R rows and K = 1 + depth canvases each:
        ids: the canvases [R, K, T], None before the first forward.
        place: row of `logits` that holds a position's logits [R, K, T], -1 for none.
        token, sure: what each row's last logits would write, and how surely [R, T].
        count: open positions of each row at that time [R].
        took: rows that took part in the last forward.
    """

    def __init__(self, depth: int):
        self.depth, self.ids, self.calls = depth, None, 0

    def __call__(
        self, model, view: View, rows: Int[Tensor, " b"], open_: Bool[Tensor, "b T"]
    ) -> Float[Tensor, "N V"]:
        """Logits of the open positions, from a draft where one came true."""
        self.took, self.calls = self.missing(view, rows, open_), 0
        if self.took.any():
            self.compute(model, view, rows[self.took], open_[self.took])
            self.calls = 1
        known = (self.ids[rows] == view.ids[rows, None]).all(-1).int().argmax(1)
        logits = self.logits[self.place[rows, known][open_]]
        self.plan(rows, open_, logits)
        return logits

    def missing(self, view: View, rows, open_) -> Bool[Tensor, " b"]:
        """Rows whose canvas, or some position of it, was not computed ahead."""
        if self.ids is None:
            return torch.ones_like(rows, dtype=torch.bool)
        same = (self.ids[rows] == view.ids[rows, None]).all(-1)  # [b, K]
        first = same.int().argmax(1)
        held = (self.place[rows, first] >= 0) | ~open_
        return ~(same.any(1) & held.all(1))

    def compute(self, model, view: View, rows, open_) -> None:
        """One forward over the rows' canvases and their drafts."""
        ids = self.drafts(view, rows, open_)  # [m, K, T]
        blank = (ids == view.ids[rows, None]) & open_[:, None]
        flat, valid = ids.flatten(0, 1), view.padding(rows)
        if valid is not None:
            valid = valid.repeat_interleave(ids.shape[1], 0)
        logits = logits_at(model, flat, blank.flatten(0, 1), valid)
        if self.ids is None:
            shape = (len(view.ids), 1 + self.depth, view.ids.shape[1])
            self.ids = flat.new_full(shape, -1)
            self.place = flat.new_full(shape, -1)
            self.token = torch.zeros_like(view.ids)
            self.sure = logits.new_full(view.ids.shape, -torch.inf)
            self.count = torch.zeros_like(view.phase)
            self.logits = logits[:0]
        kept = self.keep(rows)
        self.ids[rows], self.place[rows] = -1, -1
        columns = ids.shape[1]
        numbers = torch.full_like(blank, -1, dtype=torch.long)
        numbers[blank] = torch.arange(len(logits), device=ids.device) + len(kept)
        self.ids[rows, :columns], self.place[rows, :columns] = ids, numbers
        self.logits = torch.cat([kept, logits])

    def keep(self, rows) -> Float[Tensor, "n V"]:
        """Logits of the other rows, renumbered from 0; those of `rows` are dropped."""
        others = torch.ones(len(self.ids), dtype=torch.bool, device=rows.device)
        others[rows] = False
        held = (self.place >= 0) & others[:, None, None]
        kept = self.logits[self.place[held]]
        self.place[held] = torch.arange(len(kept), device=rows.device)
        return kept

    def drafts(self, view: View, rows, open_) -> Int[Tensor, "m K T"]:
        """The canvases now, and after 1 … depth further steps of the last plan.

        Each draft writes as many tokens as the last step did, the surest first.
        """
        now = view.ids[rows]
        if self.ids is None:
            return now[:, None]
        sure = self.sure[rows].masked_fill(~open_, -torch.inf)
        planned = sure > -torch.inf
        rank = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        pace = (self.count[rows] - open_.sum(1)).clamp_min(1)
        steps = torch.arange(1 + self.depth, device=now.device)
        write = rank[:, None] < (steps * pace[:, None])[..., None]  # [m, K, T]
        write &= planned[:, None]
        return torch.where(write, self.token[rows, None], now[:, None])

    def plan(self, rows, open_, logits) -> None:
        """Remember what these logits would write next."""
        best, token = logits.max(-1)
        sure = self.sure.new_full(open_.shape, -torch.inf)
        sure[open_] = (best - logits.logsumexp(-1)).to(sure.dtype)
        tokens = self.token[rows]
        tokens[open_] = token
        self.sure[rows], self.token[rows] = sure, tokens
        self.count[rows] = open_.sum(1)
