"""The one fused linear map `y = x (W0 + ΔW)ᵀ + b`: it keeps neither ΔW nor its graph, only `x` and ΔW's two halves.

An update of high rank costs a dense product wherever it is applied, so it is added to the base weight first and
multiplied once. Backward rebuilds the weight and folds its gradient onto the halves, a block of rows at a time: what
is large (ΔW, W0 + ΔW, their gradient) exists only as a block that stays in the cache. Measured by
`benchmarks/step_time.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of the weight that are rebuilt at once: 4 MiB of float32 stay in a CPU's cache; a GPU wants few, large blocks.
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
# float32 bits that a half-precision format drops.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


class Cut(NamedTuple):
    """A tensor network cut at one bond of dimension r, and the network it is measured from.

    `ΔW[(a c), (b d)] = Σ_r left[a, b, r] right[r, c, d] − Σ_r start_left[a, b, r] start_right[r, c, d]`
    for output indices (a c) and input indices (b d), the first of each the slower one.
    """

    left: Tensor  # (out_left, in_left, bond)
    right: Tensor  # (bond, out_right, in_right)
    start_left: Tensor | None = None  # as left; None: nothing is subtracted
    start_right: Tensor | None = None  # as right

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.left.shape[0] * self.right.shape[1], self.left.shape[1] * self.right.shape[2]


def fold(
    left: Tensor,  # (out_left, in_left, bond)
    right: Tensor,  # (bond, out_right, in_right)
) -> Tensor:  # (out_left, out_right, in_left, in_right), a view that merges to (out, in)
    """The product of two halves, its axes in the order of a weight. Differentiable."""
    product = left.flatten(0, 1) @ right.flatten(1)
    return product.view(*left.shape[:2], *right.shape[1:]).transpose(1, 2)


def effective_linear(
    x: Tensor,  # (*batch, in)
    weight: Tensor | None,  # (out, in); None: the update alone
    bias: Tensor | None,  # (out,)
    cuts: Sequence[Cut],
) -> Tensor:  # (*batch, out)
    """`x (weight + Σ ΔW)ᵀ + bias` in one product, differentiable in everything but the cuts' starts.

    Under autocast the product runs in autocast's dtype, as `torch.nn.functional.linear` does.
    Where every ΔW is exactly zero, the result is `F.linear(x, weight, bias)` bit for bit.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    tensors = [tensor for cut in cuts for tensor in cut]
    return _EffectiveLinear.apply(x, weight, bias, *tensors)  # type: ignore[no-any-return]


@torch.no_grad()
def effective_weight(
    weight: Tensor | None,  # (out, in), floating point, any strides; None: zero
    cuts: Sequence[Cut],
    dtype: torch.dtype | None = None,
) -> Tensor:  # (out, in), strides of `weight`
    """`weight + Σ ΔW`, summed in float32 (or float64) and cast once to `dtype` (default: that of `weight`).

    The cast to bfloat16 or float16 dithers (see `_cast`), so that no small update is lost.
    """
    out, in_ = cuts[0].shape
    dtype = dtype or (cuts[0].left.dtype if weight is None else weight.dtype)
    blocks = list(_row_blocks(cuts))
    if len(blocks) == 1:
        return _effective_rows(weight, cuts, 0, out, dtype)
    like = cuts[0].left.new_empty(out, in_) if weight is None else weight
    result = torch.empty_like(like, dtype=dtype)
    for start, stop in blocks:
        result[start:stop] = _effective_rows(weight, cuts, start, stop, dtype)
    return result


class _EffectiveLinear(torch.autograd.Function):
    """Saves x, the frozen weight and the halves; nothing of the size of the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, *tensors):  # noqa: D102
        cuts = _group(tensors)
        ctx.save_for_backward(x, weight, *tensors)
        ctx.has_bias = bias is not None
        with torch.autocast(x.device.type, enabled=False):
            effective = effective_weight(weight, cuts, x.dtype)
            return F.linear(x, effective, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # noqa: D102
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            return _gradients(ctx, *grad_outputs)


def _gradients(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and the halves, a block of rows of the weight at a time."""
    x, weight, *tensors = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *needs_tensors = ctx.needs_input_grad
    rows_x, rows_y = x.flatten(0, -2), grad_output.flatten(0, -2)
    cuts = _group(tensors)
    grad_x = torch.zeros_like(rows_x) if needs_x else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    grads = [torch.zeros_like(tensor) if needed else None for tensor, needed in zip(tensors, needs_tensors)]
    for start, stop in _row_blocks(cuts):
        block_y = rows_y[:, start:stop]
        if grad_x is not None:
            grad_x.addmm_(block_y, _effective_rows(weight, cuts, start, stop, x.dtype))
        if grad_weight is not None or any(needs_tensors):
            block = block_y.t() @ rows_x
            if grad_weight is not None:
                grad_weight[start:stop] = block
            _fold_gradient(block, cuts, grads, start, stop)
    grad_bias = rows_y.sum(0) if needs_bias and ctx.has_bias else None
    return None if grad_x is None else grad_x.view_as(x), grad_weight, grad_bias, *grads


def _group(tensors: Sequence[Tensor | None]) -> list[Cut]:
    """The cuts whose fields stand one after the other in `tensors`."""
    return [Cut(*tensors[k : k + 4]) for k in range(0, len(tensors), 4)]  # type: ignore[arg-type]


def _row_blocks(cuts: Sequence[Cut]) -> Iterator[tuple[int, int]]:
    """The blocks [start, stop) of rows to work on: each made of whole slices of every left half."""
    out, in_ = cuts[0].shape
    slice_rows = lcm(*(cut.right.shape[1] for cut in cuts))
    limit = _BLOCK_ELEMENTS.get(cuts[0].left.device.type, 2**25)
    if torch.compiler.is_compiling():
        limit = out * in_  # the compiler fuses better than blocks do
    rows = max(limit // (slice_rows * in_), 1) * slice_rows
    for start in range(0, out, rows):
        yield start, min(start + rows, out)


def _effective_rows(weight: Tensor | None, cuts: Sequence[Cut], start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows [start, stop) of weight + Σ ΔW, (stop - start, in), cast to `dtype`."""
    # Rounded as the base layer itself would be (autocast), then widened: with no update, exactly the base's weight.
    rows = None if weight is None else weight[start:stop].to(dtype).to(torch.promote_types(dtype, torch.float32))
    for cut in cuts:
        out_right = cut.right.shape[1]
        first, last = start // out_right, stop // out_right
        # Two products, then their difference: where the halves equal their start, it is exactly zero.
        update = fold(cut.left[first:last], cut.right)
        if cut.start_left is not None and cut.start_right is not None:
            update = update - fold(cut.start_left[first:last], cut.start_right)
        update = update if rows is None else rows.view(update.shape) + update
        rows = update.reshape(stop - start, -1)
    assert rows is not None
    return _cast(rows, dtype, start)


def _fold_gradient(
    block: Tensor,  # (stop - start, in): gradient of these rows of the effective weight
    cuts: Sequence[Cut],
    grads: list[Tensor | None],  # of the cuts' fields, changed in place
    start: int,
    stop: int,
) -> None:
    """Add a block's part of the gradients of the halves."""
    for k, cut in enumerate(cuts):
        (out_left, in_left, bond), (_, out_right, in_right) = cut.left.shape, cut.right.shape
        first, last = start // out_right, stop // out_right
        grad_left, grad_right = grads[4 * k], grads[4 * k + 1]
        pairs = block.view(last - first, out_right, in_left, in_right).transpose(1, 2)
        pairs = pairs.reshape((last - first) * in_left, out_right * in_right).to(cut.left.dtype)
        if grad_left is not None:
            grad_left[first:last] = (pairs @ cut.right.flatten(1).t()).view(last - first, in_left, bond)
        if grad_right is not None:
            grad_right.view(bond, -1).addmm_(cut.left[first:last].reshape(-1, bond).t(), pairs)


def _cast(rows: Tensor, dtype: torch.dtype, first_row: int) -> Tensor:
    """`rows` in `dtype`; to bfloat16 and float16 with a fixed dither instead of rounding to nearest.

    Rounding W0 + ΔW to nearest loses updates below half a unit in the last place, which is most of a small learning
    rate's steps. Here a 16-bit hash of each element's position is added to the bits that are then cut off: the
    expected value is the float32 sum, a weight that was representable comes back exactly, and the same weight gives
    the same bits on every call and machine. Compared in `benchmarks/bf16_loss.py`.
    """
    dropped = _DROPPED_BITS.get(dtype)
    if dropped is None:
        return rows.to(dtype)
    row = torch.arange(first_row, first_row + rows.shape[0], dtype=torch.int32, device=rows.device)
    column = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    noise = (row * 0x2C1B3C6D)[:, None] ^ (column * 0x297A2D39)
    noise = ((noise ^ (noise >> 15)) * 0x1B873593) >> (32 - dropped)
    noise &= (1 << dropped) - 1
    bits = rows.contiguous().view(torch.int32) + noise
    return (bits & -(1 << dropped)).view(torch.float32).to(dtype)
