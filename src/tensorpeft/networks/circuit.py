"""A circuit of two-axis tensors: `ΔW = C(I + D_1, I + D_2, …) − C(I, I, …)`, and the update made of it.

The input features are reshaped to N axes, row-major with the first slowest. One tensor after the other acts on a pair
of them, in the order (−1, −2), (−1, −3), …, (−2, −3), …: `y[.. a' .. b' ..] = Σ_ab T[a', b', a, b] x[.. a .. b ..]`. An
axis whose size differs between input and output changes it in the first tensor that acts on it, if it shrinks, or in
the last, if it grows, so that nothing in between is larger than it need be. I is the identity, in such a tensor cut off
or padded with zeros. Source: QuanTA (arXiv 2406.00132); deviations D instead of the tensors themselves, and axes that
change their size, are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import inf, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from tensorpeft.networks.cut import Cut, Halves, Network
from tensorpeft.networks.derivatives import is_transformed
from tensorpeft.networks.dtypes import at_least_float32, product_dtype, without_autocast
from tensorpeft.networks.update import AbstractFusedUpdate

_checkpoint: Any = checkpoint  # has no types

# What a row takes on its way through a circuit, forward and backward, in multiply-adds of a dense product: for every
# multiply-add of the circuit, and for every element of the states between its tensors. And the rows that making the
# matrix is worth, forward and twice in backward, per input feature. Fitted to the table of
# `benchmarks/circuit_routes.py`.
_PER_OPERATION, _PER_ELEMENT, _ROWS_PER_FEATURE = 2.2, 600, 1.25


class Shapes(NamedTuple):
    """The sizes of a circuit, known from those of its tensors."""

    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    tensors: tuple[tuple[int, int, int, int], ...]  # each (out of a, out of b, in of a, in of b)


def axis_pairs(num_axes: int) -> list[tuple[int, int]]:
    """The pairs of axes in the order of their tensors.

    >>> axis_pairs(3)
    [(2, 1), (2, 0), (1, 0)]
    """
    return list(combinations(range(num_axes - 1, -1, -1), 2))


def circuit_shapes(
    out_axes: Sequence[int],  # at least 2
    in_axes: Sequence[int],  # as many
) -> Shapes:
    """The shapes of a circuit's tensors.

    >>> circuit_shapes((2, 4), (2, 3)).tensors
    ((4, 2, 3, 2),)
    """
    pairs, current = axis_pairs(len(in_axes)), list(in_axes)
    tensors: list[tuple[int, int, int, int]] = []
    for k, pair in enumerate(pairs):
        before = [current[axis] for axis in pair]
        for axis in pair:
            is_last = not any(axis in later for later in pairs[k + 1 :])
            if is_last or out_axes[axis] < in_axes[axis]:
                current[axis] = out_axes[axis]
        tensors.append((current[pair[0]], current[pair[1]], before[0], before[1]))
    return Shapes(tuple(out_axes), tuple(in_axes), tuple(tensors))


class CircuitUpdate(AbstractFusedUpdate):
    """`ΔW = C(I + D) − C(I)`: zero, exactly, while every D is.

    In training it is applied to the activations or added to the weight, whichever a rule expects to be faster for the
    batch (`max_rows_apart`).

    Args:
        shapes: of the circuit; the deviations start at zero.
    """

    def __init__(self, shapes: Shapes):
        super().__init__()
        self.shapes = shapes
        self.max_rows_apart = _break_even_rows(shapes)
        for k, shape in enumerate(shapes.tensors, 1):
            self.register_parameter(f"tensor_{k}", nn.Parameter(torch.zeros(shape)))

    def deviations(self) -> list[Tensor]:
        """D_1, D_2, …, in the order in which they act."""
        return [getattr(self, f"tensor_{k}") for k in range(1, len(self.shapes.tensors) + 1)]

    def cut(self) -> Cut:
        """The whole ΔW as the left half: bonds across a circuit are large."""
        return Cut(CIRCUIT, tuple(self.deviations()))

    def is_cheaper_apart(self, rows: int) -> bool:
        """Whether so few rows train faster through the circuit than through a weight that it is added to."""
        return torch.compiler.is_compiling() or rows <= self.max_rows_apart

    def forward(self, x: Tensor) -> Tensor:
        """`x ΔWᵀ`, through the circuit."""
        return apply_circuit(x, self.deviations(), self.shapes)

    def tensor_name(self) -> str:
        """A circuit of its own for every weight, told by its axes."""
        return self.extra_repr()

    def extra_repr(self) -> str:
        """Axes, as in `out 16·8·8·4, in 16·8·8·4`."""
        return ", ".join(f"{name} {'·'.join(map(str, axes))}" for name, axes in zip(("out", "in"), self.shapes))


def apply_circuit(
    x: Tensor,  # (*batch, in)
    deviations: Sequence[Tensor],
    shapes: Shapes,
) -> Tensor:  # (*batch, out)
    """`x ΔWᵀ`, one tensor after the other, computed in float32 (or float64) and cast to the dtype of x or autocast.

    Keeps nothing but x for backward, which computes the states in between again.
    """
    dtype = product_dtype(x)
    rows = x.reshape(-1, *shapes.in_axes)
    if torch.is_grad_enabled() and not is_transformed():  # which know no checkpoint
        update: Tensor = _checkpoint.checkpoint(_run, rows, *deviations, use_reentrant=False, preserve_rng_state=False)
    else:
        update = _run(rows, *deviations)
    return update.reshape(*x.shape[:-1], prod(shapes.out_axes)).to(dtype)


def _run(rows: Tensor, *deviations: Tensor) -> Tensor:  # (rows, *in_axes) -> (rows, *out_axes)
    """`update ← I update + D (start + update)`, `start ← I start` for every D.

    The update is carried, not the sum of both: as the difference of two sums it would drown in their rounding, and with
    TF32 a product with the identity is not exact.
    """
    with without_autocast(rows.device):
        dtype = torch.promote_types(at_least_float32(rows).dtype, at_least_float32(deviations[0]).dtype)
        start, order = rows.to(dtype), list(range(rows.ndim - 1))  # of the axes in the state
        update: Tensor | None = None
        for pair, deviation in zip(axis_pairs(len(order)), deviations):
            out_a, out_b, in_a, in_b = deviation.shape
            moved = [axis for axis in order if axis not in pair] + list(pair)
            permutation = (0, *(1 + order.index(axis) for axis in moved))
            start, order = start.permute(permutation), moved
            update = None if update is None else update.permute(permutation)
            state = (start if update is None else start + update).reshape(-1, in_a * in_b)
            shape = (*start.shape[:-2], out_a, out_b)
            matrix = deviation.to(dtype).reshape(out_a * out_b, -1).t()
            if update is None:
                update = (state @ matrix).view(shape)
            else:
                update = torch.addmm(_resize(update, shape).reshape(-1, out_a * out_b), state, matrix).view(shape)
            start = _resize(start, shape)
        assert update is not None
        return update.permute(0, *(1 + order.index(axis) for axis in range(len(order))))


def _resize(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Every axis cut off or padded with zeros at its end: the identity between sizes."""
    if tensor.shape == torch.Size(shape):
        return tensor
    padding = [amount for old, new in zip(reversed(tensor.shape), reversed(shape)) for amount in (0, new - old)]
    return F.pad(tensor, padding)


def _in_axes(deviations: Sequence[Tensor]) -> list[int]:
    """The input axes, from the first tensor that acts on each."""
    num_axes = next(n for n in range(2, len(deviations) + 2) if n * (n - 1) // 2 == len(deviations))
    axes = [0] * num_axes
    for pair, deviation in zip(axis_pairs(num_axes), deviations):
        for axis, size in zip(pair, deviation.shape[2:]):
            axes[axis] = axes[axis] or size
    return axes


def _matrix(deviations: Sequence[Tensor]) -> Tensor:  # (out, in)
    """ΔW: the circuit's updates of the unit vectors. Differentiable."""
    axes, first = _in_axes(deviations), deviations[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    units = torch.eye(prod(axes), dtype=dtype, device=first.device).view(-1, *axes)
    return _run(units, *deviations).flatten(1).t()


def _halves(deviations: Sequence[Tensor]) -> Halves:
    weight = _matrix(deviations)
    return Halves(weight.unsqueeze(-1), weight.new_ones(1, 1, 1))


CIRCUIT = Network(_halves)


def _break_even_rows(shapes: Shapes) -> float:
    """The rows of a training step from which on adding the circuit to the weight is expected to be faster."""
    axes, operations, elements = list(shapes.in_axes), 0, prod(shapes.in_axes)
    for (a, b), (out_a, out_b, in_a, in_b) in zip(axis_pairs(len(axes)), shapes.tensors):
        axes[a], axes[b] = out_a, out_b
        operations += prod(axes) * in_a * in_b
        elements += prod(axes)
    per_row = _PER_OPERATION * operations + _PER_ELEMENT * elements
    # The third product of an effective weight, that of its gradient, is dense.
    dense = prod(shapes.out_axes) * prod(shapes.in_axes)
    rows_of_matrix = _ROWS_PER_FEATURE * prod(shapes.in_axes)
    return rows_of_matrix * per_row / (per_row - dense) if per_row > dense else inf
