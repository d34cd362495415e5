"""Where batches come from: fresh samples of a task, or epochs over a data set."""

from collections.abc import Callable

import torch
from torch import Tensor

from dlmlib.errors import check

Batch = dict[str, Tensor]


def fresh_batches(task, batch_size: int) -> Callable[[torch.Generator], Batch]:
    """New samples of a task every step: nothing can be memorised.

    Args:
        task: has `batch(n, generator)` -> dict of input_ids [n, T] and, where some
            tokens are given, maskable [n, T].
        batch_size: rows B of a global batch.
    Returns:
        batches(generator) -> dict of [B, T], for `fit`.
    Raises:
        ValueError: batch_size below 1.

    Introduced in notebook 02.
    """
    check(batch_size >= 1, "batch_size", batch_size, "an integer >= 1")
    return lambda generator: task.batch(batch_size, generator)


def batches_from(dataset, batch_size: int) -> "Epochs":
    """Shuffled epochs over a `datasets.Dataset`; every row once an epoch.

    Args:
        dataset: column input_ids, lists of one length, and optionally maskable,
            attention_mask and whatever numbers an objective reads; columns of text are
            left out.
        batch_size: rows B of a global batch.
    Returns:
        batches(generator) -> dict of [B, T], for `fit`.
    Raises:
        ValueError: no column input_ids, rows of unequal length, or batch_size outside
            1 … number of rows.

    Introduced in notebook 04.
    """
    rows, names = len(dataset), dataset.column_names
    fits = isinstance(batch_size, int) and 1 <= batch_size <= rows
    check(fits, "batch_size", batch_size, f"an integer within [1, {rows}]")
    check("input_ids" in names, "dataset columns", names, "'input_ids' among them")
    lengths = sorted({len(row) for row in dataset["input_ids"]})
    check(len(lengths) == 1, "lengths of input_ids", lengths, "one; pad the rows")
    columns = [name for name in names if is_number(dataset.features[name])]
    return Epochs(dataset.with_format("torch", columns=columns), batch_size)


def is_number(feature) -> bool:
    """Whether a column holds numbers, or lists of them."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return getattr(feature, "dtype", "").startswith(("int", "uint", "float", "bool"))


class Epochs:
    """What `batches_from` returns. `remaining` holds the rows still to come, in order.

    A batch that reaches the end of an epoch is filled from the start of the next one.
    `state_dict` is part of what `fit` saves, so that a resumed run continues in it.
    """

    def __init__(self, dataset, batch_size: int):
        self.dataset, self.batch_size = dataset, batch_size
        self.remaining = torch.empty(0, dtype=torch.long)

    def __call__(self, generator: torch.Generator) -> Batch:
        if len(self.remaining) < self.batch_size:
            epoch = torch.randperm(len(self.dataset), generator=generator)
            self.remaining = torch.cat([self.remaining, epoch])
        rows = self.remaining[: self.batch_size]
        self.remaining = self.remaining[self.batch_size :]
        return dict(self.dataset[rows.tolist()])

    def state_dict(self) -> Batch:
        """The rows still to come."""
        return {"remaining": self.remaining}

    def load_state_dict(self, state: Batch) -> None:
        """Continue from a `state_dict`."""
        self.remaining = state["remaining"]
