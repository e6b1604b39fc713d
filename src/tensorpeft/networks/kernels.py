"""ΔW of two halves added to a weight, and a weight's gradient folded onto the halves: `tensorpeft::build`, `::fold`.

Operators of torch's dispatcher: a compiled model has one node for each. On a GPU with Triton each is one kernel, in
which neither ΔW nor a sorted copy of the gradient ever lies in memory; elsewhere plain operators.
"""
# Torch does not type how operators are registered.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownLambdaType=false

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.utils.flop_counter import register_flop_formula


def build(
    weight: Tensor,  # (out_left · out_right, in_left · in_right), floating point, any strides
    left: Tensor,  # (out_left, in_left, bond)
    right: Tensor,  # (bond, out_right, in_right)
    first: tuple[int, int] = (0, 0),  # row and column of the whole matrix at which this part of it begins
    dropped_bits: int = 0,  # of float32, in the weight's dtype: that many are dithered; 0: rounded to nearest
    out: Tensor | None = None,  # as `weight`, any strides
) -> Tensor:  # as `weight`, in its dtype; contiguous, or `out`
    """`weight[(a c), (b d)] + Σ_r left[a, b, r] right[r, c, d]`, summed in the halves' dtype. Has no gradient."""
    if out is None:
        return _OPS.build.default(weight, left, right, *first, dropped_bits)  # type: ignore[no-any-return]
    _OPS.build_into.default(weight, left, right, *first, dropped_bits, out)
    return out


def fold(
    grad: Tensor,  # (out_left · out_right, in_left · in_right), floating point, any strides
    left: Tensor,  # (out_left, in_left, bond)
    right: Tensor,  # (bond, out_right, in_right)
) -> tuple[Tensor, Tensor]:  # as `left` and `right`, in their dtype; contiguous
    """The halves' gradients of a matrix's: `Σ_cd grad[(a c), (b d)] right[r, c, d]`, `Σ_ab left[a, b, r] grad[…]`.

    Has no gradient itself. The same bits on every call.
    """
    return _OPS.fold.default(grad, left, right)  # type: ignore[no-any-return]


def dither(
    part: Tensor,  # (m, n), float32, to which float64 is rounded
    dropped_bits: int,
    first_row: int,
    first_column: int,
) -> Tensor:  # (m, n), float32 whose last `dropped_bits` are zero, or NaN
    """A part of a matrix with its last bits cut off, after a hash of each element's position was added to them.

    Rounding W0 + ΔW to nearest loses updates below half a unit in the last place, which is most of a small learning
    rate's steps. Dithered, the expected value is the float32 sum (but where float16 is subnormal, which the cast
    rounds), a weight that was representable comes back exactly, and the same weight gives the same bits on every call
    and machine. What is no number stays none: the noise could make one of its bits. Compared in
    `benchmarks/bf16_loss.py`.
    """
    row = _multiples(0x2C1B3C6D, first_row, part.shape[0], part.device)
    column = _multiples(0x297A2D39, first_column, part.shape[1], part.device)
    noise = row[:, None] ^ column
    noise = ((noise ^ (noise >> 15)) * 0x1B873593) >> (32 - dropped_bits)
    part = part.float().contiguous()
    noise &= (1 << dropped_bits) - 1
    noise += part.view(torch.int32)
    noise &= -(1 << dropped_bits)
    return noise.view(torch.float32).masked_fill_(part.isnan(), float("nan"))


def _multiples(factor: int, first: int, count: int, device: torch.device) -> Tensor:  # (count,), int32
    """The lowest 32 bits of factor · [first, first + count).

    In int64, where nothing overflows: what int32's overflow does in C++, to which inductor compiles this, is undefined.
    And through `&`: an affine function of positions inductor computes in the type of the kernel's indices, int32 again.
    """
    return ((torch.arange(first, first + count, device=device) & 0x7FFFFFFF) * factor).to(torch.int32)


# Not `torch.library.custom_op`, whose calls cost four times as much, and those that write to `out` ten times.
_LIBRARY = Library("tensorpeft", "FRAGMENT")
_BUILD = "Tensor weight, Tensor left, Tensor right, SymInt first_row, SymInt first_column, int dropped_bits"
for schema in (
    f"build({_BUILD}) -> Tensor",
    f"build_into({_BUILD}, Tensor(a!) out) -> ()",
    "fold(Tensor grad, Tensor left, Tensor right) -> (Tensor, Tensor)",
):
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
_OPS: Any = torch.ops.tensorpeft


def _build_into(
    weight: Tensor, left: Tensor, right: Tensor, first_row: int, first_column: int, dropped_bits: int, out: Tensor
) -> None:
    shape = (left.shape[0], right.shape[1], left.shape[1], right.shape[2])
    product = left.flatten(0, 1) @ right.flatten(1)
    update = product.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
    if dropped_bits == 0:
        torch.add(weight.view(shape), update, out=out.view(shape))
        return
    out.copy_(dither((weight.view(shape) + update).reshape(weight.shape), dropped_bits, first_row, first_column))


def _fold(grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    pairs = grad.view(left.shape[0], right.shape[1], left.shape[1], right.shape[2]).transpose(1, 2)
    # Sorted and widened in one pass.
    pairs = pairs.to(left.dtype, memory_format=torch.contiguous_format).contiguous().view(-1, right[0].numel())
    grad_left, grad_right = pairs @ right.flatten(1).t(), left.flatten(0, 1).t() @ pairs
    return grad_left.view(left.shape), grad_right.view(right.shape)


def _build_into_on_gpu(
    weight: Tensor, left: Tensor, right: Tensor, first_row: int, first_column: int, dropped_bits: int, out: Tensor
) -> None:
    kernels = _triton_kernels(weight.device)
    if kernels is None or not (_is_suitable(left, right, weight) and _has_rows(out)):
        return _build_into(weight, left, right, first_row, first_column, dropped_bits, out)
    with _current(weight.device):
        kernels.build(weight, left, right, first_row, first_column, dropped_bits, out)


def _fold_on_gpu(grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    kernels = _triton_kernels(grad.device)
    if kernels is None or not _is_suitable(left, right, grad):
        return _fold(grad, left, right)
    with _current(grad.device):
        return kernels.fold(grad, left, right)  # type: ignore[no-any-return]


def _is_suitable(left: Tensor, right: Tensor, matrix: Tensor) -> bool:
    is_float32 = left.dtype == right.dtype == torch.float32 and matrix.dtype != torch.float64
    # The right half's blocks are counted on the second axis of a GPU's grid, which ends at 2**16.
    return is_float32 and right[0].numel() <= 2**20 and _has_rows(matrix) and _has_rows(left)


def _has_rows(tensor: Tensor) -> bool:
    """Whether neighbours of the last axis are neighbours in memory."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of a model spread over several."""
    return torch.cuda.device(device)


@cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """The kernels, if Triton is there and can build them."""
    if find_spec("triton") is None:
        return None
    from tensorpeft.networks import triton_kernels

    try:
        with _current(device):
            # As large as blocks are, for what they take of a GPU.
            left, right = torch.ones(1, 1, 32, device=device), torch.ones(32, 16, 16, device=device)
            for matrix in (right[0], right[0].bfloat16()):
                triton_kernels.fold(matrix, left, right)
            triton_kernels.build(right[0].bfloat16(), left, right, 0, 0, 16, right[0].bfloat16())
    except Exception as error:  # no C compiler, an old GPU, …: whatever Triton raises
        warnings.warn(f"Triton cannot build a kernel here, training will be slower: {error}", stacklevel=2)
        return None
    return triton_kernels


def _fake_fold(grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left.new_empty(left.shape), right.new_empty(right.shape)


def _into_new(build_into: Callable[..., None]) -> Callable[..., Tensor]:
    def build(weight: Tensor, *rest: Any) -> Tensor:
        out = weight.new_empty(weight.shape)
        build_into(weight, *rest, out)
        return out

    return build


for name, plain, on_gpu, fake in (
    ("build", _into_new(_build_into), _into_new(_build_into_on_gpu), _into_new(lambda *_: None)),
    ("build_into", _build_into, _build_into_on_gpu, lambda *_: None),
    ("fold", _fold, _fold_on_gpu, _fake_fold),
):
    _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, on_gpu, "CUDA")
    register_fake(f"tensorpeft::{name}", fake, lib=_LIBRARY)


@register_flop_formula([_OPS.build, _OPS.build_into])
def _build_flops(weight: tuple[int, ...], left: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two for each element of the matrix and of the bond."""
    return 2 * weight[0] * weight[1] * left[2]


@register_flop_formula(_OPS.fold)
def _fold_flops(grad: tuple[int, ...], left: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 4 * grad[0] * grad[1] * left[2]
