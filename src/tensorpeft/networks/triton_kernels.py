"""Triton kernels of `networks.kernels`. Imported where Triton is, which torch brings along with CUDA.

A weight's rows are pairs (a c) and its columns pairs (b d): left half (a b), right half (c d). Tiles are of the product
(a b) × (c d), and read as (c, a b, d), where neighbours in (a b) are neighbours in memory: d alone may be short.
"""
# Triton has no types, and a kernel's parameters are none of Python's.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARPS = 8
_SHORTEST_SUM = 16  # of tl.dot
# From so many programs on those of `fold` take several blocks each: about one for each processor of a large GPU. Their
# number follows from the shapes alone, so that the same gradient gives the same bits on every call.
_PROGRAMS = 128


@triton.jit(do_not_specialize=["first_row", "first_column"])
def _build(
    weight,
    left,
    right,
    out,
    first_row,
    first_column,
    num_pairs,
    in_left,
    bond,
    weight_stride,
    out_stride,
    left_stride_a,
    left_stride_b,
    OUT_RIGHT: tl.constexpr,  # noqa: N803
    IN_RIGHT: tl.constexpr,  # noqa: N803
    DROPPED: tl.constexpr,  # noqa: N803
    PAIRS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    BOND: tl.constexpr,  # noqa: N803
):
    ab = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    a, b = ab // in_left, ab % in_left
    first_c, first_d = _corner(IN_RIGHT, ROWS, COLUMNS)
    c, d = first_c + tl.arange(0, ROWS), first_d + tl.arange(0, COLUMNS)
    row = a[None, :, None] * OUT_RIGHT + c[:, None, None]
    column = b[None, :, None] * IN_RIGHT + d[None, None, :]
    inside = (ab < num_pairs)[None, :, None] & (c < OUT_RIGHT)[:, None, None] & (d < IN_RIGHT)[None, None, :]
    # Under way while the product is computed.
    part = tl.load(weight + row.to(tl.int64) * weight_stride + column, inside)

    cd = tl.arange(0, ROWS * COLUMNS)
    c, d = first_c + cd // COLUMNS, first_d + cd % COLUMNS
    left += a.to(tl.int64) * left_stride_a + b.to(tl.int64) * left_stride_b
    right += c * IN_RIGHT + d
    product = tl.full((PAIRS, ROWS * COLUMNS), 0.0, tl.float32)
    for start in range(0, bond, BOND):
        r = start + tl.arange(0, BOND)
        factor = tl.load(left[:, None] + r[None, :], (ab < num_pairs)[:, None] & (r < bond)[None, :], 0.0)
        other = tl.load(
            right[None, :] + (r.to(tl.int64) * (OUT_RIGHT * IN_RIGHT))[:, None],
            (r < bond)[:, None] & ((c < OUT_RIGHT) & (d < IN_RIGHT))[None, :],
            0.0,
        )
        product = tl.dot(factor, other, product, input_precision="ieee")
    update = product.reshape(PAIRS, ROWS, COLUMNS).permute(1, 0, 2)

    total = part.to(tl.float32) + update
    if DROPPED > 0:
        noise = ((first_row + row) * 0x2C1B3C6D) ^ ((first_column + column) * 0x297A2D39)
        noise = ((noise ^ (noise >> 15)) * 0x1B873593) >> (32 - DROPPED)
        bits = total.to(tl.int32, bitcast=True) + (noise & ((1 << DROPPED) - 1))
        dithered = (bits & -(1 << DROPPED)).to(tl.float32, bitcast=True)
        total = tl.where(total == total, dithered, total)  # NaN stays NaN
    tl.store(out + row.to(tl.int64) * out_stride + column, total.to(out.dtype.element_ty), inside)


@triton.jit
def _corner(IN_RIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    tile = tl.program_id(1)
    num = (IN_RIGHT + COLUMNS - 1) // COLUMNS
    return tile // num * ROWS, tile % num * COLUMNS


@triton.jit(do_not_specialize=["tiles"])
def _fold(
    grad,
    left,
    right,  # (c d, r): lanes then differ in r, and no two of them meet in a bank of shared memory
    left_parts,
    right_parts,
    num_pairs,
    in_left,
    bond,
    tiles,
    grad_stride,
    left_stride_a,
    left_stride_b,
    OUT_RIGHT: tl.constexpr,  # noqa: N803
    IN_RIGHT: tl.constexpr,  # noqa: N803
    OPERAND: tl.constexpr,  # noqa: N803
    PAIRS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    BOND: tl.constexpr,  # noqa: N803
):
    span, slices = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_c, first_d = _corner(IN_RIGHT, ROWS, COLUMNS)
    r = tl.program_id(2) * BOND + tl.arange(0, BOND)
    cd = tl.arange(0, ROWS * COLUMNS)
    c, d = first_c + cd // COLUMNS, first_d + cd % COLUMNS
    is_right = ((c < OUT_RIGHT) & (d < IN_RIGHT))[:, None] & (r < bond)[None, :]
    cd = c.to(tl.int64) * IN_RIGHT + d
    right_half = tl.load(right + (cd * bond)[:, None] + r[None, :], is_right, 0.0)
    right_sum = tl.full((ROWS * COLUMNS, BOND), 0.0, tl.float32)
    c, d = first_c + tl.arange(0, ROWS), first_d + tl.arange(0, COLUMNS)
    for tile in range(tiles):
        ab = (span * tiles + tile) * PAIRS + tl.arange(0, PAIRS)
        a, b = ab // in_left, ab % in_left
        row = a[None, :, None] * OUT_RIGHT + c[:, None, None]
        column = b[None, :, None] * IN_RIGHT + d[None, None, :]
        inside = (ab < num_pairs)[None, :, None] & (c < OUT_RIGHT)[:, None, None] & (d < IN_RIGHT)[None, None, :]
        part = tl.load(grad + row.to(tl.int64) * grad_stride + column, inside, 0.0)
        part = part.permute(1, 0, 2).reshape(PAIRS, ROWS * COLUMNS)
        is_left = (ab < num_pairs)[:, None] & (r < bond)[None, :]
        place = (a.to(tl.int64) * left_stride_a + b.to(tl.int64) * left_stride_b)[:, None] + r[None, :]
        left_half = tl.load(left + place, is_left, 0.0)
        left_sum = _add_product(tl.full((PAIRS, BOND), 0.0, tl.float32), part, right_half, OPERAND)
        right_sum = _add_product(right_sum, part.trans(), left_half, OPERAND)
        place = (slices * num_pairs + ab)[:, None] * bond + r[None, :]
        tl.store(left_parts + place, left_sum, is_left)
    place = (span.to(tl.int64) * bond + r)[None, :] * (OUT_RIGHT * IN_RIGHT) + cd[:, None]
    tl.store(right_parts + place, right_sum, is_right)


@triton.jit
def _add_product(total, grad, half, OPERAND: tl.constexpr):  # noqa: N803
    """`total + grad @ half` in float32."""
    if grad.dtype == tl.bfloat16:
        # A float32 is the sum of three bfloat16, and theirs are products that tensor cores form exactly and sum in
        # float32; its own would take longer than reading the gradient does.
        for _ in tl.static_range(3):
            part = half.to(tl.bfloat16)
            total = tl.dot(grad.to(OPERAND), part.to(OPERAND), total, input_precision="ieee")
            half -= part.to(tl.float32)
    else:
        total = tl.dot(grad.to(tl.float32), half, total, input_precision="ieee")
    return total


def build(
    weight: Tensor,  # (out_left · out_right, in_left · in_right), contiguous columns
    left: Tensor,  # (out_left, in_left, bond), float32, contiguous in the bond
    right: Tensor,  # (bond, out_right, in_right), float32
    first_row: int,
    first_column: int,
    dropped_bits: int,
    out: Tensor,  # as `weight`
) -> None:
    """`kernels.build`."""
    (out_left, in_left, bond), (_, out_right, in_right) = left.shape, right.shape
    rows, columns = _tile(out_right, in_right, 128)
    _build[(triton.cdiv(out_left * in_left, 64), triton.cdiv(out_right, rows) * triton.cdiv(in_right, columns))](
        weight,
        left,
        right.contiguous(),
        out,
        first_row,
        first_column,
        out_left * in_left,
        in_left,
        bond,
        weight.stride(0),
        out.stride(0),
        left.stride(0),
        left.stride(1),
        OUT_RIGHT=out_right,
        IN_RIGHT=in_right,
        DROPPED=dropped_bits,
        PAIRS=64,
        ROWS=rows,
        COLUMNS=columns,
        BOND=_SHORTEST_SUM,
        num_warps=_WARPS,
    )


def fold(
    grad: Tensor,  # (out_left · out_right, in_left · in_right), contiguous columns
    left: Tensor,  # (out_left, in_left, bond), float32, contiguous in the bond
    right: Tensor,  # (bond, out_right, in_right), float32
) -> tuple[Tensor, Tensor]:  # as `left` and `right`
    """`kernels.fold`. Reads `grad` once for every 64 of the bond.

    What the programs have summed lies in memory: for each element of a large `grad` bond / 170 float32, of a bond over
    32 bond / 100.
    """
    (out_left, in_left, bond), (_, out_right, in_right) = left.shape, right.shape
    # Blocks of the largest sizes that leave no register in memory, as compiled for an H100; not yet timed.
    is_bfloat16 = grad.dtype == torch.bfloat16
    bonds = min(max(triton.next_power_of_2(bond), _SHORTEST_SUM), 64)
    pairs = 64 if is_bfloat16 else 32
    rows, columns = _tile(out_right, in_right, 256 if bonds <= 32 else 128 if is_bfloat16 else 64)
    slices = triton.cdiv(out_right, rows) * triton.cdiv(in_right, columns)
    num_tiles = triton.cdiv(out_left * in_left, pairs)
    tiles = min(max(num_tiles * slices // _PROGRAMS, 1), 512 // pairs)
    spans = triton.cdiv(num_tiles, tiles)
    left_parts = left.new_empty(slices, *left.shape)
    right_parts = right.new_empty(spans, *right.shape)
    _fold[(spans, slices, triton.cdiv(bond, bonds))](
        grad,
        left,
        right.flatten(1).t().contiguous(),
        left_parts,
        right_parts,
        out_left * in_left,
        in_left,
        bond,
        tiles,
        grad.stride(0),
        left.stride(0),
        left.stride(1),
        OUT_RIGHT=out_right,
        IN_RIGHT=in_right,
        OPERAND=tl.bfloat16 if isinstance(_fold, triton.JITFunction) else tl.float32,  # what Triton's interpreter can
        PAIRS=pairs,
        ROWS=rows,
        COLUMNS=columns,
        BOND=bonds,
        num_warps=_WARPS,
        num_stages=1,  # copies of the next tile would take shared memory that smaller GPUs do not have
    )
    return left_parts.sum(0), right_parts.sum(0)


def _tile(out_right: int, in_right: int, size: int) -> tuple[int, int]:
    """Rows and columns of the right half for one program: powers of two, `size` together or fewer."""
    columns = min(triton.next_power_of_2(in_right), size)
    rows = min(triton.next_power_of_2(out_right), size // columns)
    return max(rows, _SHORTEST_SUM // columns), columns
