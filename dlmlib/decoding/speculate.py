"""Compute the next canvases before they are reached; lossless by construction."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.reuse import BlockCache, PrefixCache, Recompute, Reuse, View
from dlmlib.errors import check
from dlmlib.model.lazy_logits import LazyLogits, by_chunks


class Speculate(Reuse):
    """Draft and verify with the model itself.

    The last logits say what will probably be written next. So a forward computes, as
    extra rows, the canvas as it is now and `depth` drafts of what it may become. When
    the decoder then arrives at one of these canvases, its logits are there already and
    the step costs no forward; when it arrives elsewhere, the drafts are dropped. The
    logits are always those of the true canvas, so the answer is the one without
    drafts, for every order, commit rule and temperature.

    With a block cache, the drafts of a row share its kept keys and values, and the
    answer is the one of that cache alone. A row that enters a block is computed
    without drafts, and those made before are dropped.

    A forward becomes 1 + depth times as wide. It pays where a forward of few rows is
    bound by reading the weights, as on a GPU.

    Args:
        depth: number of drafts, >= 1.
        cache: PrefixCache(), DualCache(), or None to compute whole canvases.
    Raises:
        ValueError: if depth < 1, or for another cache.
    Source: the idea of FreeDave (arXiv 2510.00294). Introduced in notebook 08.
    """

    def __init__(self, depth: int = 4, cache: PrefixCache | None = None):
        whole = isinstance(depth, int) and depth >= 1
        check(whole, "depth", depth, "an integer >= 1")
        known = cache is None or isinstance(cache, PrefixCache)
        check(known, "cache", cache, "PrefixCache(), DualCache() or None")
        self.depth, self.cache = depth, cache or Reuse()

    def begin(self, model) -> "Drafts":
        """No drafts yet."""
        return Drafts(self.depth, self.cache.begin(model))


class Drafts:
    """The canvases that were computed ahead in one run, and their logits.

    Fields, with R rows and K = 1 + depth canvases each:
        memory: computes logits of canvases, and says when those it gave are void.
        ids: the canvases [R, K, T], -1 for none; None before the first forward.
        logits: of their open positions.
        place: row of `logits` that holds a position's logits [R, K, T], -1 for none.
        at: which of its canvases each row stood on last [R].
        took: rows that took part in the last forward.
    """

    def __init__(self, depth: int, memory: Recompute | BlockCache):
        self.depth, self.memory = depth, memory
        self.ids, self.calls = None, 0

    def __call__(
        self,
        model,
        view: View,
        rows: Int[Tensor, " b"],
        ids: Int[Tensor, "b T"],
        open_: Bool[Tensor, "b T"],
    ) -> LazyLogits:
        """Logits of the open positions, from a draft where one came true."""
        took = self.memory.fresh(view, rows) | self.missing(rows, ids, open_)
        self.took, self.calls = took, 0
        if took.any():
            self.compute(model, view, rows[took], ids[took], open_[took])
            self.calls = self.memory.calls
        known = (self.ids[rows] == ids[:, None]).all(-1).int().argmax(1)
        self.at[rows] = known
        return self.logits[self.place[rows, known][open_]]

    def missing(self, rows, ids, open_) -> Bool[Tensor, " b"]:
        """Rows whose canvas, or some position of it, was not computed ahead."""
        if self.ids is None:
            return torch.ones_like(rows, dtype=torch.bool)
        same = (self.ids[rows] == ids[:, None]).all(-1)  # [b, K]
        first = same.int().argmax(1)
        held = (self.place[rows, first] >= 0) | ~open_
        return ~(same.any(1) & held.all(1))

    def compute(self, model, view: View, rows, ids, open_) -> None:
        """One forward over the rows' canvases and their drafts."""
        ahead = self.drafts(view, rows, ids)  # [m, K, T]
        left = (ahead == ids[:, None]) & view.writable[rows, None]
        asked = left.any(-1)  # what is full belongs to another block, or is the end
        blank = asked[..., None] & open_[:, None]
        owner = rows[asked.nonzero()[:, 0]]
        logits = self.memory(model, view, owner, ahead[asked], blank[asked])
        if self.ids is None:
            shape = (len(view.phase), 1 + self.depth, ids.shape[1])
            self.ids = ids.new_full(shape, -1)
            self.place = ids.new_full(shape, -1)
            self.at = torch.zeros_like(view.phase)
            self.logits = logits[:0]
        kept = self.keep(rows)
        self.ids[rows], self.place[rows] = -1, -1
        columns = ahead.shape[1]
        numbers = torch.full_like(blank, -1, dtype=torch.long)
        held, new = kept.shape[0], logits.shape[0]
        numbers[blank] = torch.arange(held, held + new, device=ids.device)
        self.ids[rows, :columns], self.place[rows, :columns] = ahead, numbers
        self.logits = LazyLogits.cat([kept, logits])

    def keep(self, rows) -> LazyLogits:
        """Logits of the other rows, renumbered from 0; those of `rows` are dropped."""
        others = torch.ones(len(self.ids), dtype=torch.bool, device=rows.device)
        others[rows] = False
        held = (self.place >= 0) & others[:, None, None]
        kept = self.logits[self.place[held]]
        self.place[held] = torch.arange(kept.shape[0], device=rows.device)
        return kept

    def drafts(self, view: View, rows, ids) -> Int[Tensor, "m K T"]:
        """The canvases now, and after 1 … depth further steps as the last logits say.

        Each draft writes as many tokens as the last step did, the surest first. Where
        nothing is left to write, or no logits hold, there is no draft: -1.
        """
        if self.ids is None:
            return ids[:, None]
        writable = view.writable[rows]
        known = writable & ~self.memory.fresh(view, rows)[:, None]
        token, sure = self.plan(rows, known)
        planned = sure > -torch.inf
        rank = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        written = (self.ids[rows, self.at[rows]] != ids) & ~writable
        pace = written.sum(1).clamp_min(1)[:, None]
        steps = torch.arange(1 + self.depth, device=ids.device)
        write = rank[:, None] < (steps * pace)[..., None]  # [m, K, T]
        write &= planned[:, None]
        more = (steps - 1) * pace < planned.sum(1)[:, None]  # than the draft before
        ahead = torch.where(write, token[:, None], ids[:, None])
        return ahead.masked_fill(~more[..., None], -1)

    def plan(
        self, rows, known: Bool[Tensor, "m T"]
    ) -> tuple[Int[Tensor, "m T"], Float[Tensor, "m T"]]:
        """What the rows' last logits would write at some positions, and how surely."""
        number = self.place[rows, self.at[rows]]
        had = (number >= 0) & known
        token = torch.zeros_like(number)
        sure = torch.full(number.shape, -torch.inf, device=number.device)
        logits = self.logits[number[had]]
        best = by_chunks(lambda part: (*part.max(-1), part.logsumexp(-1)), logits)
        top, token[had], total = (torch.cat(parts) for parts in zip(*best, strict=True))
        sure[had] = (top - total).float()
        return token, sure
