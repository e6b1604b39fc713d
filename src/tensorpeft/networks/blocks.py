"""Tensors of several networks as blocks of one: what a sum of networks is made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def on_diagonal(
    blocks: Sequence[Tensor],  # equal in their other axes
    axes: Sequence[int],
    sizes: Sequence[int] | None = None,  # of each block along these axes, padded with zeros; None: as they are
) -> Tensor:
    """The blocks in one tensor, of zeros elsewhere, where they meet on the diagonal of some axes.

    Of one axis they are side by side.
    """
    widths = [block.shape[axes[0]] for block in blocks] if sizes is None else sizes
    shape = [sum(widths) if axis in axes else size for axis, size in enumerate(blocks[0].shape)]
    result = blocks[0].new_zeros(shape, dtype=reduce(torch.promote_types, [block.dtype for block in blocks]))
    start = 0
    for block, width in zip(blocks, widths):
        ends = [start + size if axis in axes else size for axis, size in enumerate(block.shape)]
        result[tuple(slice(start if axis in axes else 0, end) for axis, end in enumerate(ends))] = block
        start += width
    return result
