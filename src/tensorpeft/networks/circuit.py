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
from functools import lru_cache
from itertools import combinations, count
from math import inf, prod
from typing import NamedTuple

import opt_einsum
import torch
import torch.nn.functional as F
from opt_einsum.parser import convert_to_valid_einsum_chars
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensorpeft.networks.effective import Cut, Halves, Network, effective_linear
from tensorpeft.networks.update import AbstractFusedUpdate

# What a training step's forward and backward take by either route, in multiply-adds of a dense product: for every
# multiply-add of the circuit, and for every element of the states between its tensors, or of the weight. Fitted to the
# table of `benchmarks/circuit_routes.py`.
_APART_PER_OPERATION, _APART_PER_ELEMENT = 2.2, 600
_IN_WEIGHT_PER_OPERATION, _IN_WEIGHT_PER_ELEMENT = 9.5, 1300


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
    tensors = []
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
        return rows <= self.max_rows_apart

    def forward(self, x: Tensor) -> Tensor:
        """`x ΔWᵀ`, by the faster route."""
        if self.is_cheaper_apart(x.numel() // x.shape[-1]):
            return apply_circuit(x, self.deviations(), self.shapes)
        return effective_linear(x, None, None, [self.cut()])

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
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = x.reshape(-1, *shapes.in_axes)
    if torch.is_grad_enabled():
        update = checkpoint(_run, rows, *deviations, use_reentrant=False, preserve_rng_state=False)
    else:
        update = _run(rows, *deviations)
    return update.reshape(*x.shape[:-1], prod(shapes.out_axes)).to(dtype)  # type: ignore[union-attr]


def _run(rows: Tensor, *deviations: Tensor) -> Tensor:  # (rows, *in_axes) -> (rows, *out_axes)
    """`update ← I update + D (start + update)`, `start ← I start` for every D.

    The update is carried, not the sum of both: as the difference of two sums it would drown in their rounding, and with
    TF32 a product with the identity is not exact.
    """
    with torch.autocast(rows.device.type, enabled=False):
        start, order = _at_least_float32(rows), list(range(rows.ndim - 1))  # of the axes in the state
        update: Tensor | None = None
        for pair, deviation in zip(axis_pairs(len(order)), deviations):
            out_a, out_b, in_a, in_b = deviation.shape
            moved = [axis for axis in order if axis not in pair] + list(pair)
            permutation = (0, *(1 + order.index(axis) for axis in moved))
            start, order = start.permute(permutation), moved
            update = None if update is None else update.permute(permutation)
            state = (start if update is None else start + update).reshape(-1, in_a * in_b)
            shape = (*start.shape[:-2], out_a, out_b)
            matrix = _at_least_float32(deviation).reshape(out_a * out_b, -1).t()
            if update is None:
                update = (state @ matrix).view(shape)
            else:
                update = torch.addmm(_resize(update, shape).reshape(-1, out_a * out_b), state, matrix).view(shape)
            start = _resize(start, shape)
        assert update is not None
        return update.permute(0, *(1 + order.index(axis) for axis in range(len(order))))


def _with_identity(deviation: Tensor) -> Tensor:
    """`I + D`."""
    tensor = _at_least_float32(deviation).clone()
    _diagonal(tensor).add_(1)
    return tensor


def _resize(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Every axis cut off or padded with zeros at its end: the identity between sizes."""
    if tensor.shape == torch.Size(shape):
        return tensor
    padding = [amount for old, new in zip(reversed(tensor.shape), reversed(shape)) for amount in (0, new - old)]
    return F.pad(tensor, padding)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Step(NamedTuple):
    """One contraction of two tensors of a list: they are taken out, the result is put at its end."""

    places: tuple[int, ...]
    equation: str


@lru_cache(maxsize=256)
def _contraction(tensors: tuple[tuple[int, ...], ...]) -> tuple[Shapes, tuple[_Step, ...], int]:
    """The circuit of tensors of these shapes, the order that contracts it with the fewest operations, and how many."""
    num_axes = next(n for n in range(2, len(tensors) + 2) if n * (n - 1) // 2 == len(tensors))
    letters = map(opt_einsum.get_symbol, count())
    inputs = [next(letters) for _ in range(num_axes)]
    current, terms = list(inputs), []
    in_axes, out_axes = [0] * num_axes, [0] * num_axes
    for (a, b), shape in zip(axis_pairs(num_axes), tensors):
        for axis, size in ((a, shape[2]), (b, shape[3])):
            in_axes[axis] = in_axes[axis] or size
        out_axes[a], out_axes[b] = shape[:2]
        before, current[a], current[b] = current[a] + current[b], next(letters), next(letters)
        terms.append(current[a] + current[b] + before)
    equation = ",".join(terms) + "->" + "".join(current + inputs)
    _, path = opt_einsum.contract_path(equation, *tensors, shapes=True)
    # torch knows the letters from a to Z only; a step has few.
    steps = tuple(_Step(tuple(step[0]), convert_to_valid_einsum_chars(step[2])) for step in path.contraction_list)
    return Shapes(tuple(out_axes), tuple(in_axes), tensors), steps, int(path.opt_cost) // 2  # type: ignore[arg-type]


def _matrix(deviations: Sequence[Tensor]) -> Tensor:  # (out, in)
    """ΔW. Differentiable."""
    shapes, steps, _ = _contraction(tuple(tuple(deviation.shape) for deviation in deviations))
    operands = [_with_identity(deviation) for deviation in deviations]
    for places, equation in steps:
        taken = [operands.pop(place) for place in sorted(places, reverse=True)]
        operands.append(torch.einsum(equation, *taken))
    (weight,) = operands
    weight = weight.reshape(*shapes.out_axes, *shapes.in_axes)
    _diagonal(weight).sub_(1)
    return weight.reshape(prod(shapes.out_axes), prod(shapes.in_axes))


def _diagonal(tensor: Tensor) -> Tensor:
    """The entries whose output axes have the indices of the input axes, as a view: where the identity has its ones."""
    num_axes = tensor.ndim // 2
    for axis in range(num_axes):
        size = min(tensor.shape[0], tensor.shape[num_axes - axis])
        tensor = tensor.diagonal(dim1=0, dim2=num_axes - axis)[..., :size]
    return tensor


def _halves(deviations: Sequence[Tensor]) -> Halves:
    with torch.autocast(deviations[0].device.type, enabled=False):
        weight = _matrix(deviations)
    return Halves(weight.unsqueeze(-1), weight.new_ones(1, 1, 1))


def _pull_back(deviations: Sequence[Tensor], gradient: Halves) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [deviation.detach().requires_grad_() for deviation in deviations]
        weight = _matrix(leaves)
    return list(torch.autograd.grad(weight, leaves, gradient.left.squeeze(-1)))


CIRCUIT = Network(_halves, _pull_back)


def _break_even_rows(shapes: Shapes) -> float:
    """The rows of a training step from which on adding the circuit to the weight is expected to be faster."""
    axes, operations, elements = list(shapes.in_axes), 0, prod(shapes.in_axes)
    for (a, b), (out_a, out_b, in_a, in_b) in zip(axis_pairs(len(axes)), shapes.tensors):
        axes[a], axes[b] = out_a, out_b
        operations += prod(axes) * in_a * in_b
        elements += prod(axes)
    per_row = _APART_PER_OPERATION * operations + _APART_PER_ELEMENT * elements
    weight = prod(shapes.out_axes) * prod(shapes.in_axes)
    once = _IN_WEIGHT_PER_OPERATION * _contraction(shapes.tensors)[2] + _IN_WEIGHT_PER_ELEMENT * weight
    # The third product of an effective weight, that of its gradient, is dense.
    return once / (per_row - weight) if per_row > weight else inf
