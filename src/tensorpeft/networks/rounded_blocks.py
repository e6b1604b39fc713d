"""A matrix in 8 or 4 bits per number, with a scale for every block of 32 of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZE = 32
_LARGEST = {8: 127, 4: 7}  # by bits


class Blocks(NamedTuple):
    """n numbers in blocks."""

    # 8 bits: (n,), int8. 4 bits: ((n + 1) // 2,), uint8, each byte a pair, the first in the low half, 8 added to both.
    values: Tensor
    scales: Tensor  # ((n + 31) // 32,), bfloat16


def to_blocks(
    matrix: Tensor,  # any shape, floating point, finite
    bits: int,  # 8 or 4
) -> Blocks:
    """The numbers row by row in blocks of 32, the last one shorter: `scale · q`, symmetric, q a whole number.

    The scale is the largest size in the block, divided by 127 (8 bits) or 7 (4 bits), rounded to the nearest bfloat16,
    which has float32's range: updates are small. q is number / scale of the scale as it is stored, rounded to the
    nearest, halves to even, within -127 … 127 or -7 … 7. A block of zeros has the scale zero.
    """
    largest = _LARGEST[bits]
    numbers = matrix.detach().float().flatten()
    blocks = F.pad(numbers, (0, -len(numbers) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = (blocks.abs().amax(1) / largest).to(torch.bfloat16)
    steps = scales.float()[:, None]
    values = torch.where(steps > 0, blocks / steps, 0).round().clamp(-largest, largest).to(torch.int8)
    values = values.flatten()[: len(numbers)]
    if bits == 4:
        pairs = (F.pad(values, (0, len(values) % 2)) + 8).to(torch.uint8).view(-1, 2)
        values = pairs[:, 0] | pairs[:, 1] << 4
    return Blocks(values, scales)


def block_shapes(
    count: int,  # of the numbers
    bits: int,
) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
    """Length and dtype of the values and of the scales."""
    values = (count, torch.int8) if bits == 8 else ((count + 1) // 2, torch.uint8)
    return values, ((count + BLOCK_SIZE - 1) // BLOCK_SIZE, torch.bfloat16)


def from_blocks(
    blocks: Blocks,
    shape: tuple[int, ...],
    bits: int,
) -> Tensor:  # `shape`, float32
    """`scale · q`, one product of float32 for each number, which is exact."""
    values, count = blocks.values, torch.Size(shape).numel()
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], 1).flatten()[:count].to(torch.int8) - 8
    numbers = F.pad(values.float(), (0, -count % BLOCK_SIZE)).view(-1, BLOCK_SIZE) * blocks.scales.float()[:, None]
    return numbers.flatten()[:count].view(shape)
