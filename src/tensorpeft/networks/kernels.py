"""Triton kernels: in one pass over a weight, bit for bit, what torch's operators do in a dozen. For GPUs; optional.

Imported where Triton is, which torch brings along with CUDA.
"""
# Triton has no types, and a kernel's parameters are none of Python's.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _dithered_sum(
    weight,
    product,
    out,
    first_row,
    first_column,
    num_columns,
    weight_stride,
    out_stride,
    out_right,
    in_left,
    in_right,
    DROPPED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    left, right = row // out_right * in_left + column // in_right, row % out_right * in_right + column % in_right
    update = tl.load(product + left.to(tl.int64) * (out_right * in_right) + right, inside)
    total = tl.load(weight + row.to(tl.int64) * weight_stride + column, inside).to(tl.float32) + update
    noise = ((first_row + row) * 0x2C1B3C6D) ^ ((first_column + column) * 0x297A2D39)
    noise = ((noise ^ (noise >> 15)) * 0x1B873593) >> (32 - DROPPED)
    bits = total.to(tl.int32, bitcast=True) + (noise & ((1 << DROPPED) - 1))
    rounded = (bits & -(1 << DROPPED)).to(tl.float32, bitcast=True)
    tl.store(out + row.to(tl.int64) * out_stride + column, rounded.to(out.dtype.element_ty), inside)


def dithered_sum(
    weight: Tensor,  # (rows, columns), bfloat16 or float16, contiguous columns
    product: Tensor,  # (out_left · in_left, out_right · in_right), float32, contiguous
    sizes: tuple[int, int],  # out_right, in_right
    first: tuple[int, int],  # row and column of the whole matrix at which this part of it begins
    dropped_bits: int,  # of float32, in the weight's dtype
    out: Tensor | None = None,  # as `weight`
) -> Tensor:  # (rows, columns)
    """`effective._dither` of `weight + product`, rows (out_left out_right) and columns (in_left in_right)."""
    (rows, columns), (out_right, in_right) = weight.shape, sizes
    out = torch.empty_like(weight) if out is None else out
    _dithered_sum[(rows, triton.cdiv(columns, _BLOCK))](
        weight,
        product,
        out,
        *first,
        columns,
        weight.stride(0),
        out.stride(0),
        out_right,
        columns // in_right,
        in_right,
        dropped_bits,
        _BLOCK,
    )
    return out
