"""The one fused linear map `y = x (W0 + ΔW)ᵀ + b`: it keeps neither ΔW nor its graph, only `x` and ΔW's cores.

An update of high rank costs a dense product wherever it is applied, so it is added to the base weight first and
multiplied once. Backward rebuilds the weight and folds its gradient onto the cores, a block of rows at a time: what is
large (ΔW, W0 + ΔW, their gradient) exists only as a block. (A network without a small bond, `networks.circuit`, makes
its whole ΔW, and its gradient, while one layer is at work.) Measured by `benchmarks/step_time.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from math import lcm
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tensorpeft.networks.cut import Cut, Halves, Layout, Network, flattened, fold, plain_linear, plain_weight
from tensorpeft.networks.derivatives import (
    as_no_view,
    gradients,
    is_compiled_without_gradients,
    is_transformed,
    linear_gradients,
)
from tensorpeft.networks.dtypes import product_dtype, without_autocast
from tensorpeft.networks.kernels import build, dither
from tensorpeft.networks.kernels import fold as fold_gradient

# Elements of the weight that are rebuilt at once: bounds the memory; smaller blocks were slower on a CPU.
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
# float32 bits that a half-precision format drops.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def effective_linear(
    x: Tensor,  # (*batch, in)
    weight: Tensor | Callable[[], Tensor] | None,  # (out, in); None: the update alone
    bias: Tensor | None,  # (out,)
    cuts: Sequence[Cut],
) -> Tensor:  # (*batch, out)
    """`x (weight + Σ ΔW)ᵀ + bias` in one product, differentiable any number of times in all but the cuts' starts.

    A weight that is stored in another form is given as a function that makes the matrix: called in forward and once
    more in backward, so that the matrix is never kept, and without a gradient of its own.
    Under autocast the product runs in autocast's dtype, as `torch.nn.functional.linear` does.
    Where every ΔW is exactly zero, the result is `F.linear(x, weight, bias)` bit for bit.
    """
    x = x.to(product_dtype(x))
    layout, tensors = flattened(cuts, x.device)
    if is_transformed():
        return plain_linear(layout, bias, x, weight() if callable(weight) else weight, *tensors)
    if is_compiled_without_gradients():
        return _linear(x, weight() if callable(weight) else weight, bias, layout, tensors)
    return _EffectiveLinear.apply(x, weight, bias, layout, *tensors)  # type: ignore[no-any-return]


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, layout: Layout, tensors: Sequence[Tensor]) -> Tensor:
    """`effective_linear` without its gradients."""
    with without_autocast(x.device):
        effective = _effective_weight(weight, _updates(layout, tensors), x.dtype)
        return F.linear(x, effective, None if bias is None else bias.to(x.dtype))


@torch.no_grad()
def add_apart(
    x: Tensor,  # (*batch, in)
    cuts: Sequence[Cut],
) -> Tensor | None:  # (*batch, out)
    """`Σ x ΔWᵀ` in float32 (or float64), half by half, if for so few rows that is less work than making ΔW is.

    Of the two products with halves each costs a row its share of ΔW's elements; making ΔW costs all of them, once.
    """
    rows, sums = x.reshape(-1, x.shape[-1]), list[Tensor]()
    with without_autocast(x.device):
        for _, (left, right) in _updates(*flattened(cuts, x.device)):
            if len(rows) * (1 / len(left) + 1 / right.shape[2]) >= 1:
                return None
            grouped = rows.to(left.dtype).view(len(rows), left.shape[1], right.shape[2])
            inner = grouped @ right.permute(2, 0, 1).flatten(1)  # (rows, in_left, bond · out_right)
            inner = inner.view(len(rows), left.shape[1], len(right), right.shape[1]).permute(0, 3, 1, 2).flatten(2)
            product = (inner @ left.flatten(1).t()).transpose(1, 2)  # (rows, out_left, out_right)
            sums.append(product.reshape(*x.shape[:-1], len(left) * right.shape[1]))
    return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]


@torch.no_grad()
def effective_weight(
    weight: Tensor | None,  # (out, in), floating point, any strides; None: zero
    cuts: Sequence[Cut],
    dtype: torch.dtype,
) -> Tensor:  # (out, in), strides of `weight`
    """`weight + Σ ΔW` in `dtype`: summed in float32 (or float64) and cast once.

    The cast to bfloat16 or float16 dithers (see `kernels.dither`), so that no small update is lost.
    """
    device = cuts[0].cores[0].device if weight is None else weight.device
    with without_autocast(device):
        return _effective_weight(weight, _updates(*flattened(cuts, device)), dtype)


def trained_weight(
    weight: Tensor,  # (out, in), floating point, any strides
    cuts: Sequence[Cut],
) -> Tensor:  # (out, in), dtype and strides of `weight`
    """`effective_weight` with the gradients that `effective_linear` has, for who multiplies by it himself.

    He keeps it until backward; neither a ΔW nor its graph is kept.
    """
    layout, tensors = flattened(cuts, weight.device)
    if is_transformed():
        return plain_weight(layout, weight, *tensors)
    return _TrainedWeight.apply(weight, layout, *tensors)  # type: ignore[no-any-return]


def _effective_weight(weight: Tensor | None, updates: Sequence[_Update], dtype: torch.dtype) -> Tensor:
    blocks = list(_blocks(updates, dim=0))
    if len(blocks) == 1:
        return _effective_part(weight, updates, 0, *blocks[0], dtype)
    result = torch.empty(updates[0].halves.shape, dtype=dtype, device=updates[0].halves.left.device)
    if weight is not None:
        result = torch.empty_like(weight, dtype=dtype)
    for start, stop in blocks:
        _effective_part(weight, updates, 0, start, stop, dtype, result[start:stop])
    return result


class _Update(NamedTuple):
    """An update, contracted, for as long as one weight is being worked on."""

    trained: Halves
    halves: Halves  # of ΔW


def _updates(layout: Layout, tensors: Sequence[Tensor]) -> list[_Update]:
    """Of the cuts whose tensors stand one after the other."""
    updates: list[_Update] = []
    rest = iter(tensors)
    for network, *counts in layout:
        trained, constant = (tuple(islice(rest, count)) for count in counts)
        now = Halves(*trained) if network is None else network.halves(trained)
        halves = now
        if constant:
            halves = Halves(*constant) if network is None else _difference(network, now, trained, constant)
        updates.append(_Update(now, halves))
    return updates


def _difference(network: Network, now: Halves, cores: Sequence[Tensor], start: Sequence[Tensor]) -> Halves:
    """The halves of both networks side by side along the bond.

    One product over both costs half the memory traffic of two, but f(T) − f(T) then leaves a rounding error. So a half
    is zero as long as no core has moved: the start is exactly the base.
    """
    left, right = network.halves(start)
    moved = torch.cat([(core != other).flatten() for core, other in zip(cores, start)]).any()
    return Halves(torch.cat([now.left, left], dim=-1), torch.cat([now.right, -right]) * moved)


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
        ctx.save_for_backward(x, stored, *tensors)
        return as_no_view(_linear(x, weight() if callable(weight) else weight, bias, layout, tensors))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_output,) = grad_outputs
        x, weight, *tensors = ctx.saved_tensors
        if ctx.make_weight is not None:
            weight = ctx.make_weight()
        needs_x, needs_weight, needs_bias, _, *needs_tensors = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            wanted = (needs_x, needs_weight, needs_bias, *needs_tensors)
            plain = partial(plain_linear, ctx.layout, None)
            *firsts, grads = linear_gradients(plain, (x, weight, *tensors), wanted, grad_output)
            return *firsts, None, *grads
        with without_autocast(x.device):
            rows_x = x.reshape(-1, x.shape[-1])
            rows_y = grad_output.reshape(-1, grad_output.shape[-1])
            updates, needs_cores = _updates(ctx.layout, tensors), _needs_cores(ctx.layout, needs_tensors)
            grad_x, grad_weight, grad_halves = _block_gradients(
                rows_x, rows_y, weight, updates, needs_x, needs_weight, needs_cores
            )
            grads = _core_gradients(ctx.layout, tensors, grad_halves)
            grad_bias = rows_y.sum(0) if needs_bias else None
        return None if grad_x is None else grad_x.view_as(x), grad_weight, grad_bias, None, *grads


class _TrainedWeight(torch.autograd.Function):
    """Saves the frozen weight and the cores, which are there anyway."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layout: Layout, *tensors: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(weight, *tensors)
        with without_autocast(weight.device):
            return _effective_weight(weight, _updates(layout, tensors), weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        weight, *tensors = ctx.saved_tensors  # which a checkpoint hands out once
        needs_weight, _, *needs_tensors = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            grad_weight, *grads = gradients(
                lambda given: [plain_weight(ctx.layout, *given)],
                (weight, *tensors),
                (needs_weight, *needs_tensors),
                [grad],
            )
            return grad_weight, None, *grads
        with without_autocast(grad.device):
            updates, needs_cores = _updates(ctx.layout, tensors), _needs_cores(ctx.layout, needs_tensors)
            blocks = ((start, stop, grad[start:stop]) for start, stop in _blocks(updates, dim=0))
            grads = _core_gradients(ctx.layout, tensors, _fold_blocks(blocks, updates, needs_cores))
        return grad if needs_weight else None, None, *grads


def _needs_cores(layout: Layout, needs_tensors: Sequence[bool]) -> list[bool]:
    """Whether a trained tensor of each cut takes a gradient."""
    rest = iter(needs_tensors)
    return [any(list(islice(rest, trained + constant))[:trained]) for _, trained, constant in layout]


def _core_gradients(
    layout: Layout, tensors: Sequence[Tensor], grad_halves: Sequence[Halves | None]
) -> list[Tensor | None]:
    """The gradients of the cuts' tensors, from those of their halves."""
    grads: list[Tensor | None] = []
    for (network, trained, constant), gradient in zip(layout, grad_halves):
        pulled: Sequence[Tensor | None] = gradient or [None] * trained
        if network is not None and gradient is not None:
            pulled = _pull_back(network, tensors[len(grads) : len(grads) + trained], gradient)
        grads += [*pulled, *[None] * constant]
    return grads


def _pull_back(network: Network, cores: Sequence[Tensor], gradient: Halves) -> Sequence[Tensor]:
    """The gradients of the cores: the contraction is made again, so that no graph need be kept."""
    with torch.enable_grad():
        leaves = [core.detach().requires_grad_() for core in cores]
        halves = network.halves(leaves)
    outputs = [(half, grad) for half, grad in zip(halves, gradient) if half.requires_grad]
    return torch.autograd.grad([half for half, _ in outputs], leaves, [grad for _, grad in outputs])


def _blocks(updates: Sequence[_Update], dim: int) -> Iterator[tuple[int, int]]:
    """The blocks [start, stop) of rows (dim 0) or columns (dim 1) to work on: whole slices of every left half."""
    size, other = updates[0].halves.shape[dim], updates[0].halves.shape[1 - dim]
    slice_size = lcm(*(update.halves.right.shape[1 + dim] for update in updates))
    is_fake = isinstance(updates[0].halves.left, FakeTensor)  # a step that is only counted counts for a GPU
    limit = _BLOCK_ELEMENTS["cpu" if updates[0].halves.left.device.type == "cpu" and not is_fake else "cuda"]
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
    first = (start, 0) if dim == 0 else (0, start)
    total, halves = None, [update.halves.part(dim, start, stop) for update in updates]
    if weight is not None:
        # Rounded as the base layer itself would be (autocast): with no update, exactly the base's weight.
        total = weight.narrow(dim, start, stop - start).to(dtype)
        if len(halves) == 1:
            if out is None and not total.is_contiguous():
                out = torch.empty_like(total)  # strides matter to the product that is to have the base's bits
            return build(total, *halves[0], first, _DROPPED_BITS.get(dtype, 0), out)
        total = total.to(torch.promote_types(dtype, updates[0].halves.left.dtype))
    for part in halves:
        total = fold(part) if total is None else build(total, *part)
    assert total is not None
    total = dithered(total, dtype, first)
    return total.to(dtype) if out is None else out.copy_(total)


def dithered(
    total: Tensor,  # (m, n), in float32, or in float64 for a weight in float64
    dtype: torch.dtype,  # that it is cast to next
    first: tuple[int, int] = (0, 0),  # row and column of the whole matrix at which this part of it begins
) -> Tensor:  # (m, n), dtype of `total`
    """W0 + ΔW before its cast: itself, or, for bfloat16 and float16, dithered to numbers that the cast leaves alone."""
    return dither(total, _DROPPED_BITS[dtype], *first) if dtype in _DROPPED_BITS else total


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

    def grad_blocks() -> Iterator[tuple[int, int, Tensor]]:
        for start, stop in _blocks(updates, dim=0) if needs_weight or any(needs_cores) else ():
            block = grad_y[:, start:stop].t() @ x
            if grad_weight is not None:
                grad_weight[start:stop] = block
            yield start, stop, block

    return grad_x, grad_weight, _fold_blocks(grad_blocks(), updates, needs_cores)


def _fold_blocks(
    blocks: Iterable[tuple[int, int, Tensor]],  # rows [start, stop), and the weight's gradient there
    updates: Sequence[_Update],
    needs_cores: Sequence[bool],  # of each update
) -> list[Halves | None]:
    """The gradients of the updates' halves."""
    lefts: list[list[Tensor]] = [[] for _ in updates]
    rights: list[Tensor | None] = [None for _ in updates]
    for start, stop, block in blocks:
        for k, update in enumerate(updates):
            if needs_cores[k]:
                left, right = fold_gradient(block, *update.trained.part(0, start, stop))
                lefts[k].append(left)
                rights[k] = right if (sum_before := rights[k]) is None else sum_before.add_(right)
    grad_halves: list[Halves | None] = []
    for left, right in zip(lefts, rights):
        if right is None:
            grad_halves.append(None)
        else:
            grad_left = left[0] if len(left) == 1 else torch.cat(left)
            grad_halves.append(Halves(grad_left, right))
    return grad_halves
