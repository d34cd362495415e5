"""What may we reuse? Keys and values of columns that this step does not compute."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.decoding.canvas import Canvas
from dlmlib.errors import check
from dlmlib.model.call import accepts, positions_of, unwrapped
from dlmlib.model.kv_cache import KVCache
from dlmlib.model.lazy_logits import LazyLogits, lazy_logits_at


@dataclass
class View:
    """What a forward may know of the rows.

    Fields:
        valid: [B, T], False on padding; None if there is none.
        phase: the block each row is in [B].
        pending: whether anything of the row is left to write [B].
        writable: where this step may write [B, T].
    """

    valid: Bool[Tensor, "B T"] | None
    phase: Int[Tensor, " B"]
    pending: Bool[Tensor, " B"]
    writable: Bool[Tensor, "B T"]

    def padding(self, rows: Int[Tensor, " n"]) -> Bool[Tensor, "n T"] | None:
        """`valid` of some rows."""
        return None if self.valid is None else self.valid[rows]


class Recompute:
    """Remembers nothing: every forward sees the whole canvas. Exact."""

    calls = 1  # of the network in the last step
    took = None  # rows that took part in them [b]; None for all

    def fresh(self, view: View, rows: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Rows whose earlier logits are void, since they enter a block: none."""
        return torch.zeros_like(rows, dtype=torch.bool)

    def __call__(
        self,
        model,
        view: View,
        rows: Int[Tensor, " n"],
        ids: Int[Tensor, "n T"],
        open_: Bool[Tensor, "n T"],
    ) -> LazyLogits:
        """Logits of the open positions of some canvases, in row-major order.

        `rows`, in rising order, says whose canvases they are; a row may have several.
        """
        return lazy_logits_at(model, ids, open_, view.padding(rows))


class Reuse:
    """What a decode remembers between forwards: by default, nothing."""

    def begin(self, model) -> "Recompute | BlockCache":
        """The memory of one run."""
        return Recompute()


class PrefixCache(Reuse):
    """Keys and values left of the block are kept while the block is decoded.

    They are computed at the block's first step, by a forward over everything that also
    decodes; the steps after it feed the columns from the block to the end. An
    approximation: kept keys do not see what the block wrote since.

    Source: Fast-dLLM (arXiv 2505.22618), section 3.2. Introduced in notebook 08.
    """

    whole_suffix = True

    def begin(self, model) -> "BlockCache":
        """An empty cache.

        Raises:
            ValueError: if the model takes no `cache`.
        """
        name = type(model).__name__
        check(accepts(model, "cache"), "model", name, "a forward with cache and start")
        return BlockCache(self.whole_suffix)


class DualCache(PrefixCache):
    """Keys and values on both sides of the block are kept while it is decoded.

    As `PrefixCache`, but the steps after the first feed the block alone.

    Source: Fast-dLLM (arXiv 2505.22618), section 3.2. Introduced in notebook 08.
    """

    whole_suffix = False


class Borrowed(KVCache):
    """Rows of a cache, in any number, for one forward, which writes nothing back.

    Copies are made layer by layer: of a large model, all at once would be gigabytes.
    """

    def __init__(self, cache: KVCache, index: Int[Tensor, " n"]):
        super().__init__(cache.length)
        self.cache, self.index = cache, index

    def update(self, layer, key, value, start):
        columns = slice(start, start + key.shape[2])
        keys = self.cache.keys[layer][self.index]
        values = self.cache.values[layer][self.index]
        keys[:, :, columns], values[:, :, columns] = key, value
        return keys, values


@dataclass
class Group:
    """Rows that decode the same columns [start, stop) over one cache."""

    rows: Int[Tensor, " b"]
    start: int
    stop: int
    cache: KVCache

    def only(self, keep: Bool[Tensor, " b"]) -> "Group":
        """The group of some of its rows; a copy unless these are all."""
        if keep.all():
            return self
        cache = self.cache.rows(keep.nonzero()[:, 0])
        return Group(self.rows[keep], self.start, self.stop, cache)

    def kept(self, rows: Int[Tensor, " n"]) -> KVCache:
        """The cache as canvases of these rows see it.

        A forward overwrites all columns of the group, so it may leave them behind.
        """
        if torch.equal(rows, self.rows):
            return self.cache
        return Borrowed(self.cache, torch.searchsorted(self.rows, rows))


class BlockCache:
    """The keys and values of one run, refreshed whenever a row enters a block.

    Rows whose open columns differ are kept in separate groups, each a forward of its
    own, so that a row's answer does not depend on its neighbours.
    """

    took = None

    def __init__(self, whole_suffix: bool):
        self.whole_suffix = whole_suffix
        self.groups: list[Group] = []
        self.seen: Tensor | None = None  # [B], the phase each row was refreshed in
        self.calls = 0

    def fresh(self, view: View, rows) -> Bool[Tensor, " n"]:
        """Rows that are in another block than when they were last refreshed."""
        if self.seen is None:
            self.seen = torch.full_like(view.phase, -1)
        return self.seen[rows] != view.phase[rows]

    def __call__(self, model, view: View, rows, ids, open_) -> LazyLogits:
        """As `Recompute`, over cached keys and values where there are any.

        A row that enters a block comes with its true canvas alone: that one is kept.
        """
        fresh = self.fresh(view, rows)
        self.drop(~view.pending.index_fill(0, rows[fresh], False))
        parts, owners = [], []
        for group in self.groups:
            here = torch.isin(rows, group.rows)
            if here.any():  # the other rows of the group may only pause
                asked = rows[here], ids[here], open_[here]
                parts.append(self.inside(model, view, group, *asked))
                owners.append(here)
        if fresh.any():
            parts.append(
                self.refresh(model, view, rows[fresh], ids[fresh], open_[fresh])
            )
            owners.append(fresh)
        self.calls = len(parts)
        return in_row_order(parts, owners, open_)

    def refresh(self, model, view, rows, ids, open_) -> LazyLogits:
        """Compute everything for rows that entered a block, and keep it."""
        length = open_.shape[1]
        cache, valid = KVCache(length), view.padding(rows)
        logits = lazy_logits_at(model, ids, open_, valid, cache=cache)
        self.seen[rows] = view.phase[rows]
        first = open_.int().argmax(1)
        stop = length - open_.flip(1).int().argmax(1)
        shift = getattr(unwrapped(model).config, "shift_logits", False)
        for start, end in torch.stack([first, stop], 1).unique(dim=0).tolist():
            mine = (first == start) & (stop == end)
            self.groups.append(
                Group(
                    rows[mine],
                    max(start - shift, 0),  # a shifted logit is its left neighbour's
                    length if self.whole_suffix else end,
                    cache if mine.all() else cache.rows(mine.nonzero()[:, 0]),
                )
            )
        return logits

    def drop(self, gone: Bool[Tensor, " B"]) -> None:
        """Forget rows that are done or enter another block."""
        keeps = [(group, ~gone[group.rows]) for group in self.groups]
        self.groups = [group.only(keep) for group, keep in keeps if keep.any()]

    def inside(self, model, view, group, rows, ids, open_) -> LazyLogits:
        """Compute the group's columns only."""
        columns, valid = slice(group.start, group.stop), view.padding(rows)
        options = {"cache": group.kept(rows), "start": group.start}
        if valid is not None:
            options["position_ids"] = positions_of(valid)[:, columns]
        wanted = open_[:, columns]
        return lazy_logits_at(model, ids[:, columns], wanted, valid, **options)


def in_row_order(parts: list[LazyLogits], owners, open_) -> LazyLogits:
    """Logits of several groups of rows, put back into row-major order."""
    if len(parts) == 1:
        return parts[0]
    row = open_.nonzero()[:, 0]
    place = torch.cat([owner[row].nonzero()[:, 0] for owner in owners])
    return LazyLogits.cat(parts)[place.argsort()]


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

    def paid(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Forwards that each of the active rows took part in at the last step."""
        if self.memory.took is None:
            return torch.full_like(rows, self.each)
        return self.memory.took.view(self.each, -1).sum(0)

    def __call__(
        self,
        rows: Int[Tensor, " b"],
        open_: Bool[Tensor, "b T"],
        writable: Bool[Tensor, "b T"] | None = None,
    ) -> LazyLogits:
        """Logits of the open positions of the active rows.

        `writable` are those that this step may write, if others are only looked at.
        """
        canvas, valid, ids = self.canvas, self.valid, self.canvas.ids[rows]
        pending, may = canvas.masked.any(1), torch.zeros_like(canvas.fixed)
        may[rows] = open_ if writable is None else writable
        if not self.cfg_scale:
            view = View(valid, canvas.phase, pending, may)
            return self.memory(self.model, view, rows, ids, open_)
        both = View(
            None if valid is None else torch.cat([valid, valid]),
            torch.cat([canvas.phase, canvas.phase]),
            torch.cat([pending, pending]),
            torch.cat([may, may]),
        )
        given = (canvas.fixed & canvas.valid)[rows]
        twice = torch.cat([rows, rows + len(canvas.ids)])
        ids = torch.cat([ids, ids.masked_fill(given, canvas.mask_token_id)])
        logits = self.memory(self.model, both, twice, ids, torch.cat([open_, open_]))
        return logits.paired(self.guided)

    def guided(
        self, told: Float[Tensor, "n V"], untold: Float[Tensor, "n V"]
    ) -> Float[Tensor, "n V"]:
        """Logits of the canvas with the prompt, led away from those without it."""
        lead = (told - untold).mul_(self.cfg_scale + 1).add_(untold)
        return lead.masked_fill_(lead.isnan(), -torch.inf)  # impossible stays so
