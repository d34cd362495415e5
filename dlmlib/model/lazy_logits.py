"""Logits that are computed when they are read, a few positions at a time.

At a vocabulary of 126464 the logits of 1024 positions fill half a gigabyte, although a
decoder keeps one token and one number of each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlmlib.device import output_layer
from dlmlib.model.call import accepts, logits_at, padding_options, unwrapped

CHUNK = 2**22  # logits worked on at once: 16 MiB in float32


@dataclass
class LazyLogits:
    """Logits [N, V] of which only what is being read is in memory.

    Indexing, `cat` and `paired` choose rows; `split` computes them.

    Fields:
        states: what the output layer reads, row by row.
        head: the output layer, from some rows of `states` to their logits.
        width: V.
    """

    states: Float[Tensor, "N ..."]
    head: Callable[[Tensor], Float[Tensor, "n V"]]
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, V)."""
        return len(self.states), self.width

    def __getitem__(self, index) -> "LazyLogits":
        """Some rows, by anything that indexes a tensor's rows."""
        return LazyLogits(self.states[index], self.head, self.width)

    def split(self, rows: int) -> Iterator[Float[Tensor, "n V"]]:
        """As Tensor.split: the logits, `rows` rows at a time, on the states' device."""
        return (self.head(part).to(part.device) for part in self.states.split(rows))

    def paired(self, combine: Callable[[Tensor, Tensor], Tensor]) -> "LazyLogits":
        """combine(first half, second half), row by row: [N/2, V]."""
        both = torch.stack(self.states.chunk(2), dim=1)
        return LazyLogits(both, lambda s: combine(*self.head(s).unbind(1)), self.width)

    @staticmethod
    def cat(parts: list["LazyLogits"]) -> "LazyLogits":
        """The rows of several parts, one after the other."""
        states = torch.cat([part.states for part in parts])
        return LazyLogits(states, parts[0].head, parts[0].width)


def by_chunks(
    work: Callable, logits: "Float[Tensor, 'N V'] | LazyLogits", *along: Tensor
) -> list:
    """[work(some of the logits, the same rows of the rest), …], over all rows.

    A part is freed before the next is computed.

    Args:
        work: reads at most `CHUNK` logits at a time.
        logits: all of them, computed or not.
        along: tensors [N, ...] to split in the same way.
    """
    rows = max(1, CHUNK // logits.shape[-1])
    parts, others = iter(logits.split(rows)), [rest.split(rows) for rest in along]
    chunks = max(1, -(-logits.shape[0] // rows))
    return [work(next(parts), *(o[i] for o in others)) for i in range(chunks)]


def lazy_logits_at(
    model,
    input_ids: Int[Tensor, "B T"],
    positions: Bool[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    **options,
) -> LazyLogits:
    """`logits_at`, computed when read where the model offers `states_only`.

    Of any other model they are computed here, and only wrapped.

    Introduced in notebook 08.
    """
    head = getattr(unwrapped(model), "lm_head", None)
    if head is None or not accepts(model, "states_only"):
        logits = logits_at(model, input_ids, positions, attention_mask, **options)
        return LazyLogits(logits, lambda chosen: chosen, logits.shape[-1])
    options = {**padding_options(model, attention_mask), **options}
    options |= {"logit_positions": positions, "states_only": True}
    states = model(input_ids, **options).states
    width = unwrapped(model).config.vocab_size
    return LazyLogits(states, partial(output_layer, head), width)
