"""The one fused linear map `y = x (W0 + ΔW)ᵀ + b`: it keeps neither ΔW nor its graph, only `x` and ΔW's cores.

An update of high rank costs a dense product wherever it is applied, so it is added to the base weight first and
multiplied once. Backward rebuilds the weight and folds its gradient onto the cores, a block of rows at a time: what is
large (ΔW, W0 + ΔW, their gradient) exists only as a block. (A network without a small bond, `networks.circuit`, makes
its whole ΔW, and its gradient, while one layer is at work.) Measured by `benchmarks/step_time.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, islice
from math import lcm
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from tensorpeft.networks.dtypes import product_dtype, without_autocast

# Elements of the weight that are rebuilt at once: bounds the memory; smaller blocks were slower on a CPU.
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
# float32 bits that a half-precision format drops.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


class Halves(NamedTuple):
    """A network contracted to the two sides of one bond, of dimension r."""

    left: Tensor  # (out_left, in_left, bond)
    right: Tensor  # (bond, out_right, in_right)


class Network(NamedTuple):
    """How a kind of tensor network is cut in two. In float32 or float64, whatever the cores are in."""

    halves: Callable[[Sequence[Tensor]], Halves]  # cores -> halves; differentiable


class Ready(NamedTuple):
    """What was contracted for several weights together (`networks.group`)."""

    halves: Halves  # of the cores; they take the gradient
    # Where there is a start: the halves of the difference, side by side along the bond, and 0 where it is exactly zero.
    left: Tensor | None = None
    right: Tensor | None = None
    moved: Tensor | None = None


class Cut(NamedTuple):
    """An update `ΔW = fold(halves(cores)) − fold(halves(start))`, the second term where there is a start.

    `fold(left, right)[(a c), (b d)] = Σ_r left[a, b, r] right[r, c, d]` for output indices (a c) and input indices
    (b d), the first of each the slower one.
    """

    network: Network
    cores: tuple[Tensor, ...]
    start: tuple[Tensor, ...] = ()  # frozen, as many as the cores, or none
    ready: Ready | None = None  # what would be contracted, where it is there; of a start, or without


def fold(halves: Halves) -> Tensor:  # (out, in)
    """The matrix of two halves. Differentiable."""
    left, right = halves
    product = (left.flatten(0, 1) @ right.flatten(1)).view(*left.shape[:2], *right.shape[1:])
    return product.transpose(1, 2).reshape(left.shape[0] * right.shape[1], left.shape[1] * right.shape[2])


def effective_linear(
    x: Tensor,  # (*batch, in)
    weight: Tensor | Callable[[], Tensor] | None,  # (out, in); None: the update alone
    bias: Tensor | None,  # (out,)
    cuts: Sequence[Cut],
) -> Tensor:  # (*batch, out)
    """`x (weight + Σ ΔW)ᵀ + bias` in one product, differentiable in everything but the cuts' starts.

    A weight that is stored in another form is given as a function that makes the matrix: called in forward and once
    more in backward, so that the matrix is never kept, and without a gradient of its own.
    Under autocast the product runs in autocast's dtype, as `torch.nn.functional.linear` does.
    Where every ΔW is exactly zero, the result is `F.linear(x, weight, bias)` bit for bit.
    """
    x = x.to(product_dtype(x))
    layout, tensors = _flattened(cuts)
    return _EffectiveLinear.apply(x, weight, bias, layout, *tensors)  # type: ignore[no-any-return]


@torch.no_grad()
def effective_weight(
    weight: Tensor | None,  # (out, in), floating point, any strides; None: zero
    cuts: Sequence[Cut],
    dtype: torch.dtype,
) -> Tensor:  # (out, in), strides of `weight`
    """`weight + Σ ΔW` in `dtype`: summed in float32 (or float64) and cast once.

    The cast to bfloat16 or float16 dithers (see `_dither`), so that no small update is lost.
    """
    return _effective_weight(weight, _updates(*_flattened(cuts)), dtype)


def _effective_weight(weight: Tensor | None, updates: Sequence[_Update], dtype: torch.dtype) -> Tensor:
    blocks = list(_blocks(updates, dim=0))
    if len(blocks) == 1:
        return _effective_part(weight, updates, 0, *blocks[0], dtype)
    result = torch.empty(updates[0].shape, dtype=dtype, device=updates[0].left.device)
    if weight is not None:
        result = torch.empty_like(weight, dtype=dtype)
    for start, stop in blocks:
        _effective_part(weight, updates, 0, start, stop, dtype, result[start:stop])
    return result


# Of each cut: its network, the number of its trained tensors, and of the constant ones behind them. No network: these
# are halves already, and those of the difference to a start.
Layout = Sequence[tuple[Network | None, int, int]]


def _flattened(cuts: Sequence[Cut]) -> tuple[Layout, list[Tensor]]:
    """What autograd is given of the cuts."""
    layout: list[tuple[Network | None, int, int]] = []
    tensors: list[Tensor] = []
    for cut in cuts:
        network, trained, constant = cut.network, cut.cores, cut.start
        if cut.ready is not None and (not cut.start or cut.ready.left is not None):
            network, trained = None, cut.ready.halves
            constant = tuple(part for part in cut.ready[1:] if part is not None)
        layout.append((network, len(trained), len(constant)))
        tensors += [*trained, *constant]
    return layout, tensors


@dataclass(frozen=True)
class _Update:
    """An update, contracted to halves, for as long as one weight is being worked on."""

    trained: Halves
    left: Tensor  # the halves of ΔW
    right: Tensor
    moved: Tensor | None  # ΔW's factor: 0 as long as every core is at its start

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0] * self.right.shape[1], self.left.shape[1] * self.right.shape[2]

    def product(self, dim: int, start: int, stop: int) -> Tensor:  # (out_left · in_left, out_right · in_right)
        """Rows (dim 0) or columns (dim 1) [start, stop) of ΔW, but for its factor, in the order of the two halves."""
        slice_size = self.right.shape[1 + dim]
        left = self.left.narrow(dim, start // slice_size, (stop - start) // slice_size)
        return left.flatten(0, 1) @ self.right.flatten(1)

    def part(self, dim: int, start: int, stop: int) -> Tensor:  # (out_left, out_right, in_left, in_right), a view
        """The same with its axes as those of a matrix."""
        rows = self.left.shape[0] if dim == 1 else (stop - start) // self.right.shape[1]
        return self.product(dim, start, stop).view(rows, -1, *self.right.shape[1:]).transpose(1, 2)


def _updates(layout: Layout, tensors: Sequence[Tensor]) -> list[_Update]:
    """Of the cuts whose tensors stand one after the other."""
    updates: list[_Update] = []
    rest = iter(tensors)
    for network, *counts in layout:
        trained, constant = (tuple(islice(rest, count)) for count in counts)
        now = Halves(*trained) if network is None else network.halves(trained)
        left, right, moved = *now, None
        if network is None and constant:
            left, right, moved = constant
        elif network is not None and constant:
            left, right, moved = _difference(network, now, trained, constant)
        updates.append(_Update(now, left, right, moved))
    return updates


def _difference(
    network: Network, now: Halves, cores: Sequence[Tensor], start: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The halves of MPO(cores) − MPO(start) as one network, and the factor of their product.

    One product over both costs half the memory traffic of two, but f(T) − f(T) then leaves a rounding error. So its
    factor is zero as long as no core has moved: the start is exactly the base.
    """
    left, right = network.halves(start)
    moved = torch.cat([(core != other).flatten() for core, other in zip(cores, start)]).any()
    return torch.cat([now.left, left], dim=-1), torch.cat([now.right, -right]), moved.to(right.dtype)


class _EffectiveLinear(torch.autograd.Function):
    """Saves x, the frozen weight and the cores: tensors that are there anyway; and per cut a number."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Callable[[], Tensor] | None,
        bias: Tensor | None,
        layout: Layout,
        *tensors: Tensor,
    ) -> Tensor:
        stored, ctx.make_weight = (None, weight) if callable(weight) else (weight, None)
        ctx.layout = layout
        matrix = weight() if callable(weight) else weight
        with without_autocast(x.device):
            updates = _updates(layout, tensors)
            ctx.save_for_backward(x, stored, *tensors)
            effective = _effective_weight(matrix, updates, x.dtype)
            return F.linear(x, effective, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_output,) = grad_outputs
        x, weight, *tensors = ctx.saved_tensors
        if ctx.make_weight is not None:
            weight = ctx.make_weight()
        needs_x, needs_weight, needs_bias, _, *needs_tensors = ctx.needs_input_grad
        with without_autocast(x.device):
            rows_x = x.reshape(-1, x.shape[-1])
            rows_y = grad_output.reshape(-1, grad_output.shape[-1])
            updates = _updates(ctx.layout, tensors)
            counts = [(trained, trained + constant) for _, trained, constant in ctx.layout]
            starts = list(accumulate((count for _, count in counts), initial=0))
            needs_cores = [any(needs_tensors[k : k + trained]) for k, (trained, _) in zip(starts, counts)]
            grad_x, grad_weight, grad_halves = _block_gradients(
                rows_x, rows_y, weight, updates, needs_x, needs_weight, needs_cores
            )
            grads: list[Tensor | None] = [None for _ in tensors]
            for k, (network, trained, _), gradient in zip(starts, ctx.layout, grad_halves):
                if gradient is not None:
                    pulled = gradient if network is None else _pull_back(network, tensors[k : k + trained], gradient)
                    grads[k : k + trained] = pulled
            grad_bias = rows_y.sum(0) if needs_bias else None
        return None if grad_x is None else grad_x.view_as(x), grad_weight, grad_bias, None, *grads


def _pull_back(network: Network, cores: Sequence[Tensor], gradient: Halves) -> Sequence[Tensor]:
    """The gradients of the cores: the contraction is made again, so that no graph need be kept."""
    with torch.enable_grad():
        leaves = [core.detach().requires_grad_() for core in cores]
        halves = network.halves(leaves)
    outputs = [(half, grad) for half, grad in zip(halves, gradient) if half.requires_grad]
    return torch.autograd.grad([half for half, _ in outputs], leaves, [grad for _, grad in outputs])


def _blocks(updates: Sequence[_Update], dim: int) -> Iterator[tuple[int, int]]:
    """The blocks [start, stop) of rows (dim 0) or columns (dim 1) to work on: whole slices of every left half."""
    size, other = updates[0].shape[dim], updates[0].shape[1 - dim]
    slice_size = lcm(*(update.right.shape[1 + dim] for update in updates))
    is_fake = isinstance(updates[0].left, FakeTensor)  # a step that is only counted counts for a GPU
    limit = _BLOCK_ELEMENTS["cpu" if updates[0].left.device.type == "cpu" and not is_fake else "cuda"]
    if torch.compiler.is_compiling():
        limit = size * other  # the compiler fuses better than blocks do
    step = max(limit // (slice_size * other), 1) * slice_size
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _effective_part(
    weight: Tensor | None,
    updates: Sequence[_Update],
    dim: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
    out: Tensor | None = None,  # in `dtype`
) -> Tensor:  # (stop - start, in) for rows, (out, stop - start) for columns
    """Rows (dim 0) or columns (dim 1) [start, stop) of weight + Σ ΔW in `dtype`, written to `out` if it is given."""
    total = None
    first = (start, 0) if dim == 0 else (0, start)
    if weight is not None:
        # Rounded as the base layer itself would be (autocast), then widened: with no update, exactly the base's weight.
        part = weight.narrow(dim, start, stop - start).to(dtype)
        if len(updates) == 1 and (dithered_sum := _kernel_for(part, updates[0].left, out)) is not None:
            product, sizes = updates[0].product(dim, start, stop), updates[0].right.shape[1:]
            if updates[0].moved is not None:
                product *= updates[0].moved
            return dithered_sum(part, product, sizes, first, _DROPPED_BITS[dtype], out)
        total = part.to(torch.promote_types(dtype, updates[0].left.dtype))
    target = out if out is not None and dtype not in _DROPPED_BITS else None
    for update in updates:
        total = _sum(total, update.part(dim, start, stop), update.moved, target)
    assert total is not None
    if dtype in _DROPPED_BITS:
        total = _dither(total, dtype, *first)
    return total.to(dtype) if out is None or target is not None else out.copy_(total)


def _kernel_for(part: Tensor, left: Tensor, out: Tensor | None) -> Callable[..., Tensor] | None:
    """The kernel that sums and dithers in one pass, if these can have it. A compiler writes its own."""
    is_suitable = (
        part.is_cuda
        and part.dtype in _DROPPED_BITS
        and left.dtype == torch.float32
        and part.stride(1) == 1
        and (out is None or out.stride(1) == 1)
        and not torch.compiler.is_compiling()
        and not isinstance(part, FakeTensor)
    )
    return _load_kernel(part.device) if is_suitable else None


@cache
def _load_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """The kernel, if Triton is there and can build it."""
    if find_spec("triton") is None:
        return None
    from tensorpeft.networks.kernels import dithered_sum

    try:
        one = torch.ones(1, 1, device=device)
        dithered_sum(one.bfloat16(), one, (1, 1), (0, 0), _DROPPED_BITS[torch.bfloat16])
    except Exception as error:  # no C compiler, an old GPU, …: whatever Triton raises
        warnings.warn(f"Triton cannot build a kernel here, training will be slower: {error}", stacklevel=2)
        return None
    return dithered_sum


def _sum(total: Tensor | None, update: Tensor, factor: Tensor | None, out: Tensor | None) -> Tensor:  # (m, n)
    """(m, n) + factor · (a, b, c, d), the latter with a b = m and c d = n; written to `out` if it is given."""
    if total is None:
        update = update if factor is None else update * factor
    else:
        total, target = total.view(update.shape), None if out is None else out.view(update.shape)
        # In one pass where the layout of the result is given; a compiler makes one pass of it anyway.
        if torch.compiler.is_compiling():
            target = None
        if factor is None:
            update = torch.add(total, update, out=target)
        else:
            update = torch.addcmul(total, update, factor, out=target)
        if target is not None:
            assert out is not None
            return out
    update = update.reshape(update.shape[0] * update.shape[1], -1)
    return update if out is None else out.copy_(update)


def _block_gradients(
    x: Tensor,  # (tokens, in)
    grad_y: Tensor,  # (tokens, out)
    weight: Tensor | None,  # (out, in)
    updates: Sequence[_Update],
    needs_x: bool,
    needs_weight: bool,
    needs_cores: Sequence[bool],  # of each update
) -> tuple[Tensor | None, Tensor | None, list[Halves | None]]:
    """The gradients of x, of the weight and of the updates' halves, a block of the weight at a time.

    Blocks of columns for x, of rows for the rest: every product then has its full inner dimension, nothing is summed
    over blocks that is as large as x.
    """
    grad_x = None
    if needs_x:
        blocks = list(_blocks(updates, dim=1))
        if len(blocks) == 1:
            grad_x = grad_y @ _effective_part(weight, updates, 1, *blocks[0], x.dtype)
        else:
            grad_x = torch.empty_like(x)
            for start, stop in blocks:
                part = _effective_part(weight, updates, 1, start, stop, x.dtype)
                torch.mm(grad_y, part, out=grad_x[:, start:stop])
    grad_weight = torch.empty_like(weight) if needs_weight and weight is not None else None
    lefts: list[list[Tensor]] = [[] for _ in updates]
    rights: list[Tensor | None] = [None for _ in updates]
    for start, stop in _blocks(updates, dim=0) if needs_weight or any(needs_cores) else ():
        block = grad_y[:, start:stop].t() @ x
        if grad_weight is not None:
            grad_weight[start:stop] = block
        for k, update in enumerate(updates):
            if needs_cores[k]:
                left, rights[k] = _fold_gradient(block, update.trained, start, rights[k])
                lefts[k].append(left)
    grad_halves: list[Halves | None] = []
    for update, left, right in zip(updates, lefts, rights):
        if right is None:
            grad_halves.append(None)
        else:
            grad_left = left[0] if len(left) == 1 else torch.cat(left)
            shapes = (half.shape for half in update.trained)
            grad_halves.append(Halves(*(grad.view(shape) for grad, shape in zip((grad_left, right), shapes))))
    return grad_x, grad_weight, grad_halves


def _fold_gradient(
    block: Tensor,  # (n, in): gradient of n rows of the effective weight
    halves: Halves,
    first_row: int,
    grad_right: Tensor | None,  # (bond, out_right · in_right): of the blocks before, changed in place
) -> tuple[Tensor, Tensor]:  # (rows of out_left · in_left, bond), (bond, out_right · in_right)
    """A block's rows of the gradient of the left half, and the gradient of the right half with the block's part."""
    left, right = halves
    first = first_row // right.shape[1]
    block = block.view(-1, right.shape[1], left.shape[1], right.shape[2]).transpose(1, 2)
    # Sorted and widened in one pass.
    pairs = block.to(left.dtype, memory_format=torch.contiguous_format).contiguous().view(-1, right[0].numel())
    rows = left[first : first + len(block)].flatten(0, 1)  # (rows of out_left · in_left, bond)
    grad_right = rows.t() @ pairs if grad_right is None else grad_right.addmm_(rows.t(), pairs)
    return pairs @ right.flatten(1).t(), grad_right


def _dither(part: Tensor, dtype: torch.dtype, first_row: int, first_column: int) -> Tensor:
    """A float32 part of a matrix in bfloat16 or float16, with a fixed dither instead of rounding to nearest.

    Rounding W0 + ΔW to nearest loses updates below half a unit in the last place, which is most of a small learning
    rate's steps. Here a hash of each element's position is added to the bits that are then cut off: the expected value
    is the float32 sum, a weight that was representable comes back exactly, and the same weight gives the same bits on
    every call and machine. Compared in `benchmarks/bf16_loss.py`.
    """
    dropped = _DROPPED_BITS[dtype]
    row = _multiples(0x2C1B3C6D, first_row, part.shape[0], part.device)
    column = _multiples(0x297A2D39, first_column, part.shape[1], part.device)
    noise = row[:, None] ^ column
    noise = ((noise ^ (noise >> 15)) * 0x1B873593) >> (32 - dropped)
    bits = part.contiguous().view(torch.int32) + (noise & ((1 << dropped) - 1))
    return (bits & -(1 << dropped)).view(torch.float32).to(dtype)


def _multiples(factor: int, first: int, count: int, device: torch.device) -> Tensor:  # (count,), int32
    """The lowest 32 bits of factor · [first, first + count).

    In int64, where nothing overflows: what int32's overflow does in C++, to which inductor compiles this, is undefined.
    And through `&`: an affine function of positions inductor computes in the type of the kernel's indices, int32 again.
    """
    return ((torch.arange(first, first + count, device=device) & 0x7FFFFFFF) * factor).to(torch.int32)
