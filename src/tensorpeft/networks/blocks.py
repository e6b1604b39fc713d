"""Tensors of several networks as blocks of one: what a sum of networks is made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def on_diagonal(
    blocks: Sequence[Tensor],  # equal in their other axes
    axes: Sequence[int],
) -> Tensor:
    """The blocks in one tensor, of zeros elsewhere, where they meet on the diagonal of some axes.

    Of one axis they are side by side.
    """
    shape = [sum(sizes) if axis in axes else sizes[0] for axis, sizes in enumerate(zip(*(b.shape for b in blocks)))]
    result = blocks[0].new_zeros(shape, dtype=reduce(torch.promote_types, [block.dtype for block in blocks]))
    place = result
    for block in blocks:
        place[tuple(map(slice, block.shape))] = block
        place = place[tuple(slice(size if axis in axes else 0, None) for axis, size in enumerate(block.shape))]
    return result
