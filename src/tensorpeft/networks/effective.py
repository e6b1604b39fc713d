"""The one fused linear map `y = x (W0 + ΔW)ᵀ + b`: it keeps neither ΔW nor its graph, only `x` and ΔW's cores.

An update of high rank costs a dense product wherever it is applied, so it is added to the base weight first and
multiplied once. Backward rebuilds the weight and folds its gradient onto the cores, a block of rows at a time: what is
large (ΔW, W0 + ΔW, their gradient) exists only as a block. (A network without a small bond, `networks.circuit`, makes
its whole ΔW, and its gradient, while one layer is at work.) Measured by `benchmarks/step_time.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from itertools import accumulate, islice
from math import lcm
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tensorpeft.networks.derivatives import is_transformed, linear_gradients
from tensorpeft.networks.dtypes import product_dtype, without_autocast
from tensorpeft.networks.kernels import build, dither
from tensorpeft.networks.kernels import fold as fold_gradient

# Elements of the weight that are rebuilt at once: bounds the memory; smaller blocks were slower on a CPU.
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
# float32 bits that a half-precision format drops.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


class Halves(NamedTuple):
    """A network contracted to the two sides of one bond, of dimension r."""

    left: Tensor  # (out_left, in_left, bond)
    right: Tensor  # (bond, out_right, in_right)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0] * self.right.shape[1], self.left.shape[1] * self.right.shape[2]

    def part(self, dim: int, start: int, stop: int) -> Halves:
        """Those of rows (dim 0) or columns (dim 1) [start, stop): whole slices of the left half."""
        slice_size = self.right.shape[1 + dim]
        return Halves(self.left.narrow(dim, start // slice_size, (stop - start) // slice_size), self.right)


class Network(NamedTuple):
    """How a kind of tensor network is cut in two. In float32 or float64, whatever the cores are in."""

    halves: Callable[[Sequence[Tensor]], Halves]  # cores -> halves; differentiable


class Ready(NamedTuple):
    """What was contracted for several weights together (`networks.group`)."""

    halves: Halves  # of the cores; they take the gradient
    difference: Halves | None = None  # to the start, where there is one


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
    """`x (weight + Σ ΔW)ᵀ + bias` in one product, differentiable any number of times in all but the cuts' starts.

    A weight that is stored in another form is given as a function that makes the matrix: called in forward and once
    more in backward, so that the matrix is never kept, and without a gradient of its own.
    Under autocast the product runs in autocast's dtype, as `torch.nn.functional.linear` does.
    Where every ΔW is exactly zero, the result is `F.linear(x, weight, bias)` bit for bit.
    """
    x = x.to(product_dtype(x))
    layout, tensors = _flattened(cuts)
    if is_transformed():
        return _plain_linear(layout, bias, x, weight() if callable(weight) else weight, *tensors)
    return _EffectiveLinear.apply(x, weight, bias, layout, *tensors)  # type: ignore[no-any-return]


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
        for _, (left, right) in _updates(*_flattened(cuts)):
            if len(rows) * (1 / len(left) + 1 / right.shape[2]) >= 1:
                return None
            grouped = rows.to(left.dtype).view(-1, left.shape[1], right.shape[2])
            inner = grouped @ right.permute(2, 0, 1).flatten(1)  # (rows, in_left, bond · out_right)
            inner = inner.view(len(rows), left.shape[1], -1, right.shape[1]).permute(0, 3, 1, 2).flatten(2)
            sums.append((inner @ left.flatten(1).t()).transpose(1, 2).reshape(*x.shape[:-1], -1))
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
    with without_autocast(cuts[0].cores[0].device):
        return _effective_weight(weight, _updates(*_flattened(cuts)), dtype)


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


# Of each cut: its network, the number of its trained tensors, and of the constant ones behind them. No network: these
# are halves already, and those of the difference to a start.
Layout = Sequence[tuple[Network | None, int, int]]


def _flattened(cuts: Sequence[Cut]) -> tuple[Layout, list[Tensor]]:
    """What autograd is given of the cuts."""
    layout: list[tuple[Network | None, int, int]] = []
    tensors: list[Tensor] = []
    for cut in cuts:
        network, trained, constant = cut.network, cut.cores, cut.start
        if cut.ready is not None and (not cut.start or cut.ready.difference is not None):
            network, trained, constant = None, cut.ready.halves, (cut.ready.difference if cut.start else None) or ()
        layout.append((network, len(trained), len(constant)))
        tensors += [*trained, *constant]
    return layout, tensors


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


def _plain_linear(layout: Layout, bias: Tensor | None, x: Tensor, weight: Tensor | None, *tensors: Tensor) -> Tensor:
    """`effective_linear` of plain operations, every update in a product of its own."""
    rest, updates = iter(tensors), list[Tensor]()
    with without_autocast(x.device):
        for network, *counts in layout:
            trained, constant = (tuple(islice(rest, count)) for count in counts)
            update = fold(Halves(*trained) if network is None else network.halves(trained))
            if constant and network is None:  # of the difference, which has the update's derivatives
                update = update + (fold(Halves(*constant)) - update).detach()
            elif constant and network is not None:
                update = update - fold(network.halves(constant)).detach()
            updates.append(update)
        return plain_sum(x, weight, bias, [F.linear(x, update.to(x.dtype)) for update in updates])


def plain_sum(x: Tensor, weight: Tensor | None, bias: Tensor | None, added: Sequence[Tensor]) -> Tensor:
    """What is added to the base's product, and that, if there is a base."""
    if weight is not None:
        added = [F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), *added]
    return reduce(torch.add, added)


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
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_output,) = grad_outputs
        x, weight, *tensors = ctx.saved_tensors
        if ctx.make_weight is not None:
            weight = ctx.make_weight()
        needs_x, needs_weight, needs_bias, _, *needs_tensors = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            wanted = (needs_x, needs_weight, needs_bias, *needs_tensors)
            plain = partial(_plain_linear, ctx.layout, None)
            *firsts, grads = linear_gradients(plain, (x, weight, *tensors), wanted, grad_output)
            return *firsts, None, *grads
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
    if dtype in _DROPPED_BITS:
        total = dither(total, _DROPPED_BITS[dtype], *first)
    return total.to(dtype) if out is None else out.copy_(total)


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
    return grad_x, grad_weight, grad_halves
