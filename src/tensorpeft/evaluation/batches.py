"""Batches of rows of similar length, so that little of a batch is padding."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Row = TypeVar("Row")
Result = TypeVar("Result")


def batches_by_length(
    lengths: Sequence[int],  # of the rows
    batch_size: int,
) -> Iterator[list[int]]:  # indices of the rows
    """The batches, the longest rows first: what does not fit into memory fails at once, not at the end."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def map_batches(
    compute: Callable[[list[Row]], Sequence[Result]],  # of a batch: a result per row
    rows: Sequence[Row],
    lengths: Sequence[int],
    batch_size: int,
    on_batch: Callable[[list[int]], object],  # called after a batch with the indices of its rows
) -> list[Result]:
    """A result per row, in the rows' order."""
    results: dict[int, Result] = {}
    for indices in batches_by_length(lengths, batch_size):
        results.update(zip(indices, compute([rows[index] for index in indices]), strict=True))
        on_batch(indices)
    return [results[index] for index in range(len(rows))]
