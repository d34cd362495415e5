"""Keys and values of every layer, in columns that can be overwritten."""

from jaxtyping import Float, Int
from torch import Tensor

from dlmlib.errors import check


class KVCache:
    """Fixed-size store of keys and values; a forward overwrites what it computed.

    A causal model only ever appends. A diffusion model rewrites tokens in the middle,
    so its cache is addressed by column: a forward over the columns [start, start + n)
    replaces exactly these and attends to all `length` columns. Feeding everything
    fills it; feeding the columns from a block on is Fast-dLLM's prefix cache; feeding
    the block alone is its dual cache.

    Args:
        length: number of columns T of the full sequence.
    Source: Fast-dLLM (arXiv 2505.22618), section 3.2. Introduced in notebook 08.
    """

    def __init__(self, length: int):
        check(length >= 1, "length", length, "an integer >= 1")
        self.length = length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self,
        layer: int,
        key: Float[Tensor, "B G n C"],
        value: Float[Tensor, "B G n C"],
        start: int,
    ) -> tuple[Float[Tensor, "B G T C"], Float[Tensor, "B G T C"]]:
        """Overwrite columns [start, start + n) of `layer`; return all T columns.

        Raises:
            ValueError: if the columns lie outside the cache, or the first forward of a
                layer does not fill it.
        """
        stop = start + key.shape[2]
        check(
            0 <= start < stop <= self.length,
            "start",
            start,
            f"columns within [0, {self.length})",
        )
        if layer == len(self.keys):
            check(
                stop - start == self.length,
                "columns",
                stop - start,
                f"all {self.length} in the first forward",
            )
            self.keys.append(key.detach().clone())
            self.values.append(value.detach().clone())
        else:
            rows = self.keys[layer].shape[0]
            check(key.shape[0] == rows, "rows", key.shape[0], f"{rows}, as cached")
            self.keys[layer][:, :, start:stop] = key
            self.values[layer][:, :, start:stop] = value
        return self.keys[layer], self.values[layer]

    def rows(self, index: Int[Tensor, " b"]) -> "KVCache":
        """A copy for some of the rows."""
        chosen = KVCache(self.length)
        chosen.keys = [key[index] for key in self.keys]
        chosen.values = [value[index] for value in self.values]
        return chosen
