"""Weights as slices of one tensor over many layers: what networks with modes for layers, projections, heads share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from tensorpeft.networks.group import Parts, Tensors, tensors_of
from tensorpeft.networks.low_rank import Factors, pairs_of
from tensorpeft.networks.sketch import Gradient, leading_columns
from tensorpeft.networks.update import AbstractSummableUpdate, SharedFactors


class AbstractSliceFactors(SharedFactors, ABC):
    """The factors of several tensors whose weights are slices of them."""

    @abstractmethod
    def set_frames(
        self,
        tensor: str,  # its name
        members: Sequence[AbstractSliceUpdate],  # its weights
        gradients: Sequence[Gradient],  # of each
    ) -> None:
        """Put the factors where the gradients' tensor has its energy, and start at zero from there."""


def rows_of(
    tensor: Tensor,  # (rows, *)
    index: int | Tensor,  # of one row; or (n,)
) -> Tensor:  # (*), or (n, *)
    """A row, or some rows."""
    return tensor[index] if isinstance(index, int) else tensor.index_select(0, index)


class AbstractSliceUpdate(AbstractSummableUpdate):
    """One weight of a tensor: `ΔW = scale · K C Aᵀ`, or its transpose.

    K (inner dimension, r') stacks the rows of the weight's heads, A (outer dimension, r) meets what all weights of the
    tensor read or write, and C (r', r), or a diagonal (r,), is that of layer and projection. A fused projection stacks
    the rows K C of its projections.

    Args:
        shared: the factors.
        tensor: the name of this weight's tensor in them.
        layer: its place in the layers' mode.
        projections: places in the projections' mode, one unless the weight is a fused projection.
        heads: the heads of each projection, the first so many of their mode; ignored where there is no such mode.
        scale: s.
        inner_is_out: whether K is on the output side (query, key, value) or A is (output).
        interleaved: whether a fused projection has each head's rows of all projections together; without heads, each
            hidden unit's.
    """

    def __init__(
        self,
        shared: SharedFactors,
        tensor: str,
        layer: int,
        projections: Sequence[int],
        heads: Sequence[int],
        scale: float,
        inner_is_out: bool = True,
        interleaved: bool = False,
    ):
        super().__init__(shared)
        self.tensor = tensor
        self.layer = layer
        self.projections = tuple(projections)
        self.heads = tuple(heads)
        self.scale = scale
        self.inner_is_out = inner_is_out
        self.interleaved = interleaved

    @abstractmethod
    def outer(self, tensors: Mapping[str, Tensor]) -> Tensor:  # (outer, r)
        """A."""

    @abstractmethod
    def inner(self, tensors: Mapping[str, Tensor], heads: int) -> Tensor:  # (heads, features, r')
        """K, by heads; where the tensor has no heads, (hidden units, 1, r')."""

    @abstractmethod
    def cores(
        self, tensors: Mapping[str, Tensor], layer: int | Tensor, projection: int | Tensor
    ) -> Tensor:  # (r', r) or (r,); for (n,) layers and projections (n, r', r) or (n, r)
        """C, unscaled."""

    def factors_from(self, tensors: Mapping[str, Tensor]) -> Factors:
        """A and K on their sides, C between them."""
        outer = self.outer(tensors)
        if len(self.projections) == 1:
            core = self.cores(tensors, self.layer, self.projections[0]) * self.scale
            inner = self.inner(tensors, self.heads[0]).flatten(0, 1)
        else:
            parts = [
                _product(self.inner(tensors, heads), self.cores(tensors, self.layer, projection))
                for projection, heads in zip(self.projections, self.heads)
            ]
            inner = torch.stack(parts, 1).flatten(0, 2) if self.interleaved else torch.cat(parts).flatten(0, 1)
            core = outer.new_full((outer.shape[1],), self.scale)
        # Row-major: a product with a transposed core rounds as the other factor lies in memory, as a file may have it.
        if self.inner_is_out:
            return Factors(outer.mT, core.contiguous(), inner)
        return Factors(inner.mT, core.mT.contiguous() if core.ndim == 2 else core, outer)

    def group_key(self) -> Hashable | None:
        """Of one tensor, on one side of it, with as many heads; fused projections are made alone."""
        return (self.tensor, self.heads, self.inner_is_out) if len(self.projections) == 1 else None

    def make_parts(
        self,
        members: Sequence[AbstractSliceUpdate],
        own: Sequence[Tensors],
        shared: Tensors,
        dtype: torch.dtype | None,
    ) -> list[Parts]:
        """The pairs of factors: A and K are the same for all."""
        if len(members) == 1:
            return super().make_parts(members, own, shared, dtype)
        outer, inner = self.outer(shared), self.inner(shared, self.heads[0]).flatten(0, 1)
        places = torch.tensor([(member.layer, member.projections[0]) for member in members], device=outer.device)
        cores = self.cores(shared, *places.unbind(1)) * self.scale
        if self.inner_is_out:
            return pairs_of(Factors(outer.t(), cores, inner), dtype)
        return pairs_of(Factors(inner.t(), cores.mT if cores.ndim == 3 else cores, outer), dtype)

    def unfold_inner(
        self,
        rows: Tensor,  # (inner dimension, *)
    ) -> list[tuple[int, Tensor]]:  # heads and features as `inner` has them: (heads, features, *)
        """The rows of a matrix, in the order that `factors_from` stacks them, by projection, head and feature."""
        tensors = {} if self.shared is None else tensors_of(self.shared)
        shapes = [self.inner(tensors, heads).shape for heads in self.heads]
        if self.interleaved:
            split = torch.unflatten(rows, 0, (shapes[0][0], len(shapes), shapes[0][1])).unbind(1)
        else:
            split = torch.split(torch.unflatten(rows, 0, (-1, shapes[0][1])), [shape[0] for shape in shapes])
        return list(zip(self.projections, split))

    def extra_repr(self) -> str:
        """Which weight of which tensor."""
        return f"{self.tensor}, layer {self.layer}, projection {', '.join(map(str, self.projections))}"


def set_slice_frames(
    updates: Mapping[str, AbstractSliceUpdate],
    gradients: Mapping[str, Gradient],  # of the same names
) -> None:
    """Set the frames of every tensor that the updates are slices of, each from the gradients of all its weights."""
    tensors: dict[str, list[str]] = {}
    for name, update in updates.items():
        tensors.setdefault(update.tensor, []).append(name)
    for tensor, names in tensors.items():
        shared = cast(AbstractSliceFactors, updates[names[0]].shared)
        shared.set_frames(tensor, [updates[name] for name in names], [gradients[name] for name in names])


@torch.no_grad()
def fold_gradients(
    members: Sequence[AbstractSliceUpdate],
    gradients: Sequence[Gradient],  # of each
    rank: int,
    modes: Mapping[str, int],  # B the features; C_M the projections, C_L the layers, C_H the heads, as far as there are
) -> tuple[Tensor, Tensor]:  # (outer, r), r at most the rank; (projections, layers, heads, features, r)
    """The leading directions of the outer side over all weights, and the tensor of the gradients between them."""
    # Each as (inner, outer).
    gradients = [g if m.inner_is_out else Gradient(g.right, g.core.t(), g.left) for m, g in zip(members, gradients)]
    frame = leading_columns([gradient.right for gradient in gradients], rank)
    folded = frame.new_zeros([modes.get(name, 1) for name in ("C_M", "C_L", "C_H")] + [modes["B"], frame.shape[1]])
    for member, gradient in zip(members, gradients):
        rows = gradient.left @ (gradient.core @ (gradient.right.t() @ frame))
        for projection, part in member.unfold_inner(rows):
            part = part.reshape(-1, *folded.shape[-2:])  # a tensor without heads has one
            folded[projection, member.layer, : len(part)] = part
    return frame, folded


def _product(inner: Tensor, core: Tensor) -> Tensor:
    return inner * core if core.ndim == 1 else inner @ core
