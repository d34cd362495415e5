"""Parallel reasoning data: several solution paths of a problem in one instance.

    prompt | header 1, path 1 | header 2, path 2 | … | last header, summary

and, as the control, the same paths one after the other as a single long chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from dlmlib.decoding.where import Streams
from dlmlib.device import uniform
from dlmlib.diffusion.objective import NELBO, maskable_of
from dlmlib.errors import check

OUTSIDE = -1  # the segment of prompts, headers and whatever else is given


@dataclass(frozen=True)
class Layout:
    """Where everything stands in a structured instance; all instances share one.

    Fields:
        headers: token ids that open each path, and at the end the summary.
        path_length: tokens of a path; shorter ones are filled up.
        summary_length: tokens of the summary.
        filler: token that fills up, such as [EOS]; the model learns to write it.
    Introduced in notebook 13.
    """

    headers: tuple[tuple[int, ...], ...]
    path_length: int
    summary_length: int
    filler: int

    def __post_init__(self):
        check(len(self.headers) >= 2, "headers", self.headers, "a path's, a summary's")
        for name in ("path_length", "summary_length"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")

    @property
    def paths(self) -> int:
        """Number of paths."""
        return len(self.headers) - 1

    def where(self, concurrent: bool = False) -> Streams:
        """Parallel-forced decoding of such a canvas; ranges count from its end."""
        ranges, stop = [], 0
        for header in reversed(self.headers):
            size = self.summary_length if not ranges else self.path_length
            ranges.append(slice(stop - size, stop or None))
            stop -= size + len(header)
        return Streams(ranges[:0:-1], ranges[0], concurrent)

    def canvas(self, prompt: Sequence[int], mask_token_id: int) -> list[int]:
        """The prompt, the clamped headers, and masks between: what `decode` fills."""
        blank = [[mask_token_id] * self.path_length] * self.paths
        end = [mask_token_id] * self.summary_length
        return parallel_instance(prompt, blank, end, self)["input_ids"]


def parallel_instance(
    prompt: Sequence[int],
    paths: Sequence[Sequence[int]],
    summary: Sequence[int],
    layout: Layout,
    generator: torch.Generator | None = None,
) -> dict[str, list]:
    """Several independent paths of one problem as a structured instance.

    Args:
        prompt, paths, summary: token ids. Paths may be wrong, the summary is right.
        layout: headers and lengths.
        generator: if given, the paths stand in a random order ("stream shuffling").
    Returns:
        input_ids; maskable, False on prompt and headers; segment, the number of the
        path, `layout.paths` for the summary, -1 elsewhere.
    Raises:
        ValueError: another number of paths, or one that is too long.
    Source: NAP (arXiv 2602.23225), section 5.2. Introduced in notebook 13.
    """
    check(len(paths) == layout.paths, "paths", len(paths), f"{layout.paths} paths")
    order = range(layout.paths)
    if generator is not None:
        order = torch.randperm(layout.paths, generator=generator).tolist()
    bodies = [filled(paths[i], layout.path_length, layout.filler) for i in order]
    bodies.append(filled(summary, layout.summary_length, layout.filler))
    ids, segment = list(prompt), [OUTSIDE] * len(prompt)
    for number, (header, body) in enumerate(zip(layout.headers, bodies, strict=True)):
        ids += [*header, *body]
        segment += [OUTSIDE] * len(header) + [number] * len(body)
    return instance(ids, segment)


def sequential_instance(
    prompt: Sequence[int],
    paths: Sequence[Sequence[int]],
    summary: Sequence[int],
    layout: Layout,
) -> dict[str, list]:
    """The control: the same tokens as one chain, path after path, then the summary.

    The headers are part of the text that the model has to write, and the filler comes
    at the end, so the length is that of the parallel instance.

    Args and Raises: as `parallel_instance`. Returns: the same columns; segment is 0 on
    all of the chain.
    Introduced in notebook 13.
    """
    parallel_instance(prompt, paths, summary, layout)  # refuses what does not fit
    parts = zip(layout.headers, [*paths, summary], strict=True)
    chain = [token for header, body in parts for token in (*header, *body)]
    width = sum(map(len, layout.headers)) + layout.paths * layout.path_length
    chain = filled(chain, width + layout.summary_length, layout.filler)
    return instance([*prompt, *chain], [OUTSIDE] * len(prompt) + [0] * len(chain))


def filled(ids: Sequence[int], length: int, filler: int) -> list[int]:
    """Token ids filled up to a length."""
    check(len(ids) <= length, "len(ids)", len(ids), f"at most {length} tokens")
    return [*ids, *[filler] * (length - len(ids))]


def instance(ids: list[int], segment: list[int]) -> dict[str, list]:
    """The columns of one row."""
    maskable = [number != OUTSIDE for number in segment]
    return {"input_ids": ids, "maskable": maskable, "segment": segment}


def curate(
    dataset: Dataset | IterableDataset,
    tokenizer,
    layout: Layout,
    *,
    prompt: str,
    paths: Sequence[str],
    summary: str,
    sequential: bool = False,
) -> Dataset | IterableDataset:
    """Instances from the text columns of any data set, streamed ones included.

    Rows whose texts are longer than the layout allows are left out.

    Args:
        dataset: one problem a row.
        tokenizer: turns text into ids; nothing is added to them.
        layout: headers and lengths.
        prompt, summary: names of their columns.
        paths: names of the columns of the paths.
        sequential: build the control instead.
    Returns:
        columns input_ids, maskable and segment.
    Introduced in notebook 13.
    """
    build = sequential_instance if sequential else parallel_instance

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def build_rows(rows: dict[str, list]) -> dict[str, list]:
        columns = {"input_ids": [], "maskable": [], "segment": []}
        for question, end, *texts in zip(
            rows[prompt], rows[summary], *(rows[name] for name in paths), strict=True
        ):
            bodies, last = [encode(text) for text in texts], encode(end)
            longest = max(map(len, bodies))
            if longest <= layout.path_length and len(last) <= layout.summary_length:
                row = build(encode(question), bodies, last, layout)
                for name, values in row.items():
                    columns[name].append(values)
        return columns

    names = dataset.column_names
    return dataset.map(build_rows, batched=True, remove_columns=names)


class StructuredMasking(NELBO):
    """Corruption that respects streams: the summary is hidden while paths are noisy.

    With t from `times`, tokens of the paths are hidden with chance r_max t, and the
    summary as a whole while 1 - t < alpha, else like the paths. The loss is the mean
    over hidden tokens times the number of maskable ones: no longer a bound on -log p,
    since not every subset can be hidden.

    Args:
        mask_token_id, times: as for `NELBO`; "iid" or "low_discrepancy".
        largest: r_max, in (0, 1].
        alpha: in [0, 1].
    Raises:
        ValueError: a number out of range.
    Source: the released trainer of NAP (arXiv 2602.23225), where it is off by default.
    Introduced in notebook 13.
    """

    def __init__(
        self,
        mask_token_id: int,
        times: str = "low_discrepancy",
        largest: float = 0.9,
        alpha: float = 0.8,
    ):
        super().__init__(mask_token_id, times=times)
        check(0 < largest <= 1, "largest", largest, "within (0, 1]")
        check(0 <= alpha <= 1, "alpha", alpha, "within [0, 1]")
        self.largest, self.alpha = largest, alpha

    def corrupt(
        self, batch: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """As `NELBO`; the batch also has segment [B, T], see `parallel_instance`."""
        ids, maskable, segment = (
            batch["input_ids"],
            maskable_of(batch),
            batch["segment"],
        )
        draw = uniform(ids.shape, generator, ids.device)
        t = self.spread(len(ids), generator, ids.device)[:, None]
        summary = segment == segment.max()
        hidden = (draw < self.largest * t) | (summary & (1 - t < self.alpha))
        hidden = hidden & maskable
        tokens = maskable.sum(1)
        weight = tokens / hidden.sum(1).clamp_min(1)
        noisy = ids.masked_fill(hidden, self.mask_token_id)
        return {**batch, "noisy_ids": noisy, "weight": weight, "tokens": tokens}
