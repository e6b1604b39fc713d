"""The updates of many weights as one vector, folded to a tensor: `vec(ΔW_1, ΔW_2, …) = s · vec(T_1 ⊗ … ⊗ T_K)`.

Each T_k is of order M with modes n_km: a matrix `A_1 A_2ᵀ` for M = 2, else a Tucker tensor `C ×1 A_1 … ×M A_M`. The
Kronecker product has the modes `Π_k n_km`, and as many entries as the weights together, or a few more. The weights lie
in it one after the other, row-major; so each is a range of entries, hence in a range of slices of the first mode, and
only those slices are made for it. Source: SuperLoRA (arXiv 2403.11887).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tensorpeft.networks.cut import Cut, Halves, Network
from tensorpeft.networks.dtypes import at_least_float32, without_autocast
from tensorpeft.networks.update import AbstractSummedUpdate, SharedFactors


class Form(NamedTuple):
    """The sizes of one T."""

    modes: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def has_core(self) -> bool:
        """A matrix has none: it would change nothing."""
        return len(self.modes) > 2


class FoldedFactors(SharedFactors):
    """The factors of the tensors of several groups of weights, each under its own name: `all_A_1_2`, `all_C_1`, ….

    Made without values worth keeping: the method fills them.

    Args:
        forms: name of a group -> T_1, T_2, ….
    """

    def __init__(self, forms: dict[str, tuple[Form, ...]]):
        super().__init__()
        self.forms = forms
        for name, parts in forms.items():
            for k, form in enumerate(parts, 1):
                for m, shape in enumerate(zip(form.modes, form.ranks), 1):
                    self.register_parameter(f"{name}_A_{k}_{m}", nn.Parameter(torch.zeros(shape)))
                if form.has_core:
                    self.register_parameter(f"{name}_C_{k}", nn.Parameter(torch.zeros(form.ranks)))

    def extra_repr(self) -> str:
        """Modes of every tensor."""
        return "; ".join(f"{name}: {_described(forms)}" for name, forms in self.forms.items())


class FoldedUpdate(AbstractSummedUpdate):
    """One weight of a group.

    Args:
        shared: the factors.
        group: the name of this weight's group in them.
        first: the place of its first entry in the group's vector.
        shape: (out, in).
        scale: s.
    """

    def __init__(self, shared: FoldedFactors, group: str, first: int, shape: tuple[int, int], scale: float):
        super().__init__(shared)
        self.group = group
        self.shape = shape
        self.names = [
            [*(f"{group}_A_{k}_{m}" for m in range(1, len(form.modes) + 1)), *([f"{group}_C_{k}"] * form.has_core)]
            for k, form in enumerate(shared.forms[group], 1)
        ]
        counts = [len(names) for names in self.names]
        self.network = Network(partial(_halves, counts, first, shape, scale))

    def cut(self) -> Cut:
        """The whole ΔW as the left half: the weight's shape and the tensor's have nothing to do with each other."""
        tensors = cast(FoldedFactors, self.shared).tensors()
        return Cut(self.network, tuple(tensors[name] for names in self.names for name in names))

    def tensor_name(self) -> str:
        """The group and its tensor's modes."""
        return f"{self.group}: {_described(cast(FoldedFactors, self.shared).forms[self.group])}"

    def extra_repr(self) -> str:
        """Which group."""
        return f"{self.group}, out {self.shape[0]}, in {self.shape[1]}"


def _described(forms: Sequence[Form]) -> str:
    return " ⊗ ".join(f"{'·'.join(map(str, form.modes))} (r {'·'.join(map(str, form.ranks))})" for form in forms)


def _halves(
    counts: Sequence[int],  # of the tensors of each T
    first: int,
    shape: tuple[int, int],
    scale: float,
    tensors: Sequence[Tensor],  # of each T its factors, then its core
) -> Halves:
    with without_autocast(tensors[0].device):
        weight = _entries(counts, first, prod(shape), [at_least_float32(tensor) for tensor in tensors])
    weight = (weight * scale).view(*shape, 1)
    return Halves(weight, weight.new_ones(1, 1, 1))


def _entries(counts: Sequence[int], first: int, number: int, tensors: Sequence[Tensor]) -> Tensor:  # (number,)
    """The entries [first, first + number) of the Kronecker product. Differentiable."""
    parts = [list(tensors[sum(counts[:k]) : sum(counts[: k + 1])]) for k in range(len(counts))]
    # The slices of a row of A_11: all else is whole in them.
    sizes = [len(factor) for part in parts for factor in (part if len(part) == 2 else part[:-1])]
    slice_size = prod(sizes[1:])
    start, stop = first // slice_size, -(-(first + number) // slice_size)
    parts[0][0] = parts[0][0][start:stop]
    result = _tensor(parts[0])
    for part in parts[1:]:
        result = _kronecker(result, _tensor(part))
    return result.flatten()[first - start * slice_size :][:number]


def _tensor(part: Sequence[Tensor]) -> Tensor:  # (n_1, …, n_M)
    """`A_1 A_2ᵀ`, or `C ×1 A_1 ×2 A_2 …`."""
    if len(part) == 2:
        return part[0] @ part[1].t()
    first, *factors, core = part
    state = first @ core.flatten(1)
    for factor in factors:
        # The mode to contract is the first; the product leaves it the last, so that all are in order again in the end.
        # Of matrices: which product torch takes for tensors of more axes, it decides by `requires_grad`.
        columns = state.view(len(first), factor.shape[1], -1).mT.reshape(-1, factor.shape[1])
        state = columns @ factor.t()
    return state.view(len(first), *(len(factor) for factor in factors))


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    """Of tensors of one order: the product of their entries, the left one's place in each mode the slower."""
    order = left.ndim
    product = left.reshape(-1, 1) * right.reshape(1, -1)
    axes = [axis for mode in range(order) for axis in (mode, order + mode)]
    shape = [a * b for a, b in zip(left.shape, right.shape)]
    return product.view(*left.shape, *right.shape).permute(axes).reshape(shape)
