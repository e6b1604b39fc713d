"""QuanTA in plain numpy and float64 by its written formula: every tensor a matrix over the whole space, multiplied.

Nothing is asked of the library but its parameters, by name, and how it splits a size. With `xp=torch` autograd
differentiates the same formula.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from cases import Model
from own_factor_oracles import shape_of
from tensorpeft import QuantaConfig
from tensorpeft.modes import factor_modes

__all__ = ["adapt", "axes_of", "dense_updates", "expected_shapes", "quanta_update"]

Array: TypeAlias = Any  # of numpy, or of torch where gradients are wanted


def axes_of(size: int, num_axes: int) -> list[int]:
    """The axes of a size where the configuration names none: the paper's for 4096, else of near equal size."""
    if (size, num_axes) == (4096, 4):
        return [16, 8, 8, 4]
    return sorted(factor_modes(size, num_axes), reverse=True)


def pairs(num_axes: int) -> list[tuple[int, int]]:
    """(−1, −2), (−1, −3), ..., (−1, −N), (−2, −3), ..., counted from the front."""
    return list(combinations(reversed(range(num_axes)), 2))


def states(out_axes: Sequence[int], in_axes: Sequence[int]) -> list[list[int]]:
    """The sizes of all axes before the first tensor, between the tensors, and after the last."""
    order = pairs(len(in_axes))
    sizes = [list(in_axes) for _ in range(len(order) + 1)]
    for axis, (out, in_) in enumerate(zip(out_axes, in_axes, strict=True)):
        touching = [k for k, pair in enumerate(order) if axis in pair]
        change = min(touching) if out < in_ else max(touching)
        for k in range(change + 1, len(sizes)):
            sizes[k][axis] = out
    return sizes


def expected_shapes(out_axes: Sequence[int], in_axes: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(a', b', a, b) of every tensor, in order."""
    sizes = states(out_axes, in_axes)
    return [
        (sizes[k + 1][a], sizes[k + 1][b], sizes[k][a], sizes[k][b]) for k, (a, b) in enumerate(pairs(len(in_axes)))
    ]


def quanta_circuit(
    tensors: Sequence[Array],  # (a', b', a, b), one per pair of axes
    out_axes: Sequence[int],
    in_axes: Sequence[int],
    xp: ModuleType = np,
) -> Array:  # (out, in)
    """The product of every tensor's matrix, `T[a',b',a,b] Π_c δ(c',c)` with c over the axes that it leaves alone."""
    num_axes, sizes = len(in_axes), states(out_axes, in_axes)
    rows, columns = "ABCDEFGHIJ"[:num_axes], "abcdefghij"[:num_axes]
    circuit = xp.eye(math.prod(in_axes), dtype=xp.float64)
    for k, ((a, b), tensor) in enumerate(zip(pairs(num_axes), tensors, strict=True)):
        others = [c for c in range(num_axes) if c not in (a, b)]
        terms = [rows[a] + rows[b] + columns[a] + columns[b], *(rows[c] + columns[c] for c in others)]
        deltas = [xp.eye(sizes[k][c], dtype=xp.float64) for c in others]
        matrix = xp.einsum(f"{','.join(terms)}->{rows}{columns}", tensor, *deltas)
        circuit = matrix.reshape(math.prod(sizes[k + 1]), math.prod(sizes[k])) @ circuit
    return circuit


def quanta_update(
    deviations: Sequence[Array],  # (a', b', a, b), one per pair of axes
    out_axes: Sequence[int],
    in_axes: Sequence[int],
    xp: ModuleType = np,
) -> Array:  # (out, in)
    """`C(I + D) − C(I)`, with `I[a',b',a,b] = δ(a',a) δ(b',b)`."""
    identities = []
    for a_out, b_out, a, b in expected_shapes(out_axes, in_axes):
        deltas = xp.eye(a_out, a, dtype=xp.float64), xp.eye(b_out, b, dtype=xp.float64)
        identities.append(xp.einsum("xa,yb->xyab", *deltas))
    tensors = [identity + deviation for identity, deviation in zip(identities, deviations, strict=True)]
    return quanta_circuit(tensors, out_axes, in_axes, xp) - quanta_circuit(identities, out_axes, in_axes, xp)


def adapt(model: Model, num_axes: int, init_weights: bool = False, **more: Any) -> PeftModel:
    """A fresh model with an adapter that is not the identity."""
    torch.manual_seed(3)
    config = QuantaConfig(num_axes=num_axes, init_weights=init_weights, target_modules=model.targets, **more)
    return get_peft_model(model.fresh(), config).eval()


def dense_updates(
    base: nn.Module,
    layers: Mapping[str, Mapping[str, Array]],  # {layer: {name: tensor}}
    num_axes: int,
    xp: ModuleType = np,
) -> dict[str, Array]:  # {layer: its weight's shape}
    """Every layer's update, laid out as the layer stores its weight."""
    updates = {}
    for name, tensors in layers.items():
        deviations = [tensors[f"tensor_{k + 1}"] for k in range(len(tensors))]
        if xp is np:
            deviations = [tensor.detach().numpy() for tensor in deviations]
        axes = [axes_of(size, num_axes) for size in shape_of(base, name)]
        update = quanta_update(deviations, *axes, xp)
        updates[name] = update.T if isinstance(base.get_submodule(name), Conv1D) else update
    return updates
