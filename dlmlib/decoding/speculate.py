"""Compute the next canvases before they are reached; lossless by construction."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.reuse import Reuse, View
from dlmlib.errors import check
from dlmlib.model.lazy_logits import LazyLogits, by_chunks, lazy_logits_at


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
        logits: of their open positions.
        place: row of `logits` that holds a position's logits [R, K, T], -1 for none.
        at: which of its canvases each row stood on last [R].
        took: rows that took part in the last forward.
    """

    def __init__(self, depth: int):
        self.depth, self.ids, self.calls = depth, None, 0

    def __call__(
        self, model, view: View, rows: Int[Tensor, " b"], open_: Bool[Tensor, "b T"]
    ) -> LazyLogits:
        """Logits of the open positions, from a draft where one came true."""
        self.took, self.calls = self.missing(view, rows, open_), 0
        if self.took.any():
            self.compute(model, view, rows[self.took], open_[self.took])
            self.calls = 1
        known = (self.ids[rows] == view.ids[rows, None]).all(-1).int().argmax(1)
        self.at[rows] = known
        return self.logits[self.place[rows, known][open_]]

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
        logits = lazy_logits_at(model, flat, blank.flatten(0, 1), valid)
        if self.ids is None:
            shape = (len(view.ids), 1 + self.depth, view.ids.shape[1])
            self.ids = flat.new_full(shape, -1)
            self.place = flat.new_full(shape, -1)
            self.at = torch.zeros_like(view.phase)
            self.logits = logits[:0]
        kept = self.keep(rows)
        self.ids[rows], self.place[rows] = -1, -1
        columns = ids.shape[1]
        numbers = torch.full_like(blank, -1, dtype=torch.long)
        held, new = kept.shape[0], logits.shape[0]
        numbers[blank] = torch.arange(held, held + new, device=ids.device)
        self.ids[rows, :columns], self.place[rows, :columns] = ids, numbers
        self.logits = LazyLogits.cat([kept, logits])

    def keep(self, rows) -> LazyLogits:
        """Logits of the other rows, renumbered from 0; those of `rows` are dropped."""
        others = torch.ones(len(self.ids), dtype=torch.bool, device=rows.device)
        others[rows] = False
        held = (self.place >= 0) & others[:, None, None]
        kept = self.logits[self.place[held]]
        self.place[held] = torch.arange(kept.shape[0], device=rows.device)
        return kept

    def drafts(self, view: View, rows, open_) -> Int[Tensor, "m K T"]:
        """The canvases now, and after 1 … depth further steps as the last logits say.

        Each draft writes as many tokens as the last step did, the surest first.
        """
        now = view.ids[rows]
        if self.ids is None:
            return now[:, None]
        token, sure, count = self.plan(rows)
        sure = sure.masked_fill(~open_, -torch.inf)
        planned = sure > -torch.inf
        rank = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        pace = (count - open_.sum(1)).clamp_min(1)
        steps = torch.arange(1 + self.depth, device=now.device)
        write = rank[:, None] < (steps * pace[:, None])[..., None]  # [m, K, T]
        write &= planned[:, None]
        return torch.where(write, token[:, None], now[:, None])

    def plan(
        self, rows
    ) -> tuple[Int[Tensor, "m T"], Float[Tensor, "m T"], Int[Tensor, " m"]]:
        """What the rows' last logits would write, how surely, and how many they are."""
        number = self.place[rows, self.at[rows]]
        had = number >= 0
        token = torch.zeros_like(number)
        sure = torch.full(number.shape, -torch.inf, device=number.device)
        logits = self.logits[number[had]]
        best = by_chunks(lambda part: (*part.max(-1), part.logsumexp(-1)), logits)
        top, token[had], total = (torch.cat(parts) for parts in zip(*best, strict=True))
        sure[had] = (top - total).float()
        return token, sure, had.sum(1)
