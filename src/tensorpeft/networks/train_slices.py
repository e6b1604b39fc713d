"""Tensor trains over the weights of many layers: one core for the inputs, the layers, the projections, the outputs.

The weight of layer l and projection m is `ΔWᵀ = G1 G2[l] G3[m] G4`; with a core for the heads, the columns of head h
are `G1 G2[l] G3[m] G4[h] G5`. Source: MetaTT (arXiv 2506.09105), 4D and 5D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensorpeft.networks.blocks import on_diagonal
from tensorpeft.networks.dtypes import at_least_float32
from tensorpeft.networks.sketch import Gradient, put_columns
from tensorpeft.networks.slices import AbstractSliceFactors, AbstractSliceUpdate, fold_gradients, rows_of

_linalg: Any = torch.linalg  # has no types


class TrainFactors(AbstractSliceFactors):
    """The cores of several trains, each under its own name: `1024x4096_G1` and so on.

    The first is (mode, bond), the last (bond, mode), those between (mode, bond, bond). Made without values worth
    keeping: the method fills them.

    Args:
        sizes: name of a train -> the modes of its cores: inputs, layers, projections, perhaps heads, outputs.
        bonds: name of a train -> its bonds, one fewer.
    """

    def __init__(self, sizes: dict[str, list[int]], bonds: dict[str, list[int]]):
        super().__init__()
        self.sizes = sizes
        for name, modes in sizes.items():
            ends = [bonds[name][0], *bonds[name], bonds[name][-1]]
            shapes = [(mode, *ends[k : k + 2]) for k, mode in enumerate(modes)]
            shapes[0], shapes[-1] = (modes[0], ends[0]), (ends[-1], modes[-1])  # type: ignore[assignment]
            for k, shape in enumerate(shapes, 1):
                self.register_parameter(f"{name}_G{k}", nn.Parameter(torch.zeros(shape)))

    def cores(self, name: str) -> list[nn.Parameter]:
        """Those of one train."""
        return [getattr(self, f"{name}_G{k}") for k in range(1, len(self.sizes[name]) + 1)]

    def bonds(self, name: str) -> list[int]:
        """Those between the cores of one train."""
        return [core.shape[-1] for core in self.cores(name)[:-1]]

    @torch.no_grad()
    def set_frames(
        self,
        tensor: str,  # its name
        members: Sequence[AbstractSliceUpdate],  # its weights
        gradients: Sequence[Gradient],  # of each
    ) -> None:
        """Put all cores but the last where a train of the gradients has them, as large as identities; the last is zero.

        Source: TT-SVD (Oseledets, 2011, algorithm 1), of the tensor between the first core's leading directions.
        """
        first, *inner, last = self.cores(tensor)
        _, layers, projections, *heads, features = self.sizes[tensor]
        modes = {"C_M": projections, "C_L": layers, "C_H": prod(heads), "B": features}
        frame, folded = fold_gradients(members, gradients, first.shape[1], modes)
        put_columns(first, frame)
        rest = folded.permute(4, 1, 0, 2, 3)  # (bond, layers, projections, heads, features)
        for core in inner:
            left, values, right = _linalg.svd(rest.flatten(0, 1).flatten(1), full_matrices=False)
            kept = min(core.shape[2], len(values))
            found = torch.unflatten(left[:, :kept], 0, rest.shape[:2]).transpose(0, 1)  # (mode, bond, kept)
            core[:, : found.shape[1], :kept] = found.to(core) * sqrt(len(core))
            rest = torch.unflatten(values[:kept, None] * right[:kept], 1, rest.shape[2:])
        nn.init.zeros_(last)

    @torch.no_grad()
    def cut(self, name: str, rank: int) -> dict[nn.Parameter, nn.Parameter]:
        """Cut the bonds of one train, none of whose cores is zero, to a rank: what each parameter was replaced by."""
        old = self.cores(name)
        first, *inner, last = old
        chain = [first[None], *(core.transpose(0, 1) for core in inner), last[..., None]]
        cut = round_train(chain, rank)
        shaped = [cut[0][0], *(core.transpose(0, 1) for core in cut[1:-1]), cut[-1][..., 0]]
        new = [nn.Parameter(core.contiguous().to(was), was.requires_grad) for core, was in zip(shaped, old)]
        for k, parameter in enumerate(new, 1):
            setattr(self, f"{name}_G{k}", parameter)
        return dict(zip(old, new))

    def extra_repr(self) -> str:
        """Modes and bonds of every train."""
        return "; ".join(f"{name}: {self.describe(name)}" for name in self.sizes)

    def describe(self, name: str) -> str:
        """Modes and bonds, as in `1024 · 24 · 2 · 1024, bonds 8 · 8 · 8`."""
        modes, bonds = (" · ".join(map(str, numbers)) for numbers in (self.sizes[name], self.bonds(name)))
        return f"{modes}, bonds {bonds}"


class TrainSliceUpdate(AbstractSliceUpdate):
    """One weight of a train. Its first core is on the side that has no heads, the last ones on the other."""

    def outer(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """G1."""
        return tensors[f"{self.tensor}_G1"]

    def inner(self, tensors: Mapping[str, Tensor], heads: int) -> Tensor:
        """G4, or `G4[h] G5` of each head."""
        last = tensors.get(f"{self.tensor}_G5")
        per_head = tensors[f"{self.tensor}_G4"]
        if last is None:
            return per_head.t().unsqueeze(1)
        per_head = per_head[:heads]
        return (per_head.flatten(0, 1) @ last).view(*per_head.shape[:2], -1).mT

    def cores(self, tensors: Mapping[str, Tensor], layer: int | Tensor, projection: int | Tensor) -> Tensor:
        """`(G2[l] G3[m])ᵀ`."""
        layers, projections = tensors[f"{self.tensor}_G2"], tensors[f"{self.tensor}_G3"]
        return (rows_of(layers, layer) @ rows_of(projections, projection)).mT

    def sum_shared(self, others: Sequence[TrainSliceUpdate], weights: Sequence[float]) -> dict[str, Tensor]:
        """Each core on the diagonal of a larger one; each one's last with its weight and scale."""
        updates = (self, *others)
        shared = [cast(TrainFactors, update.shared) for update in updates]
        if any(factors.sizes != shared[0].sizes for factors in shared):
            raise ValueError(f"trains of the modes {[factors.sizes for factors in shared]}: expected equal ones.")
        found = dict[str, Tensor]()
        for name in shared[0].sizes:
            every = [map(at_least_float32, factors.cores(name)) for factors in shared]
            *cores, lasts = [list(same) for same in zip(*every)]
            for k, same in enumerate(cores, 1):
                found[f"{name}_G{k}"] = on_diagonal(same, [1] if k == 1 else [1, 2])
            scaled = [last * weight * update.scale for last, weight, update in zip(lasts, weights, updates)]
            found[f"{name}_G{len(cores) + 1}"] = on_diagonal(scaled, [0])
        return found

    def tensor_name(self) -> str:
        """The train, its modes and its bonds."""
        return f"{self.tensor}: {cast(TrainFactors, self.shared).describe(self.tensor)}"


@torch.no_grad()
def round_train(
    cores: Sequence[Tensor],  # each (bond_left, mode, bond_right)
    rank: int,  # the largest bond
) -> list[Tensor]:  # the same; float64
    """A train cut to a rank, its norm spread equally over the cores.

    The error is at most √(N − 1) times the best one's: before a bond is cut, all cores to its right are made
    orthogonal, so that the cut is of the tensor and not of a core. Source: Oseledets (2011), algorithm 2.
    """
    cut = [core.double() for core in cores]
    for k in range(len(cut) - 1, 0, -1):
        orthogonal, triangle = _linalg.qr(cut[k].flatten(1).mT)
        cut[k] = torch.unflatten(orthogonal.mT, 1, cut[k].shape[1:])
        cut[k - 1] = cut[k - 1] @ triangle.mT
    for k in range(len(cut) - 1):
        left, values, right = _linalg.svd(cut[k].flatten(0, 1), full_matrices=False)
        kept = min(rank, len(values))
        cut[k] = torch.unflatten(left[:, :kept], 0, cut[k].shape[:2])
        rest = (values[:kept, None] * right[:kept]) @ cut[k + 1].flatten(1)
        cut[k + 1] = torch.unflatten(rest, 1, cut[k + 1].shape[1:])
    norms = [core.square().sum().sqrt().item() for core in cut]
    mean = prod(norm ** (1 / len(cut)) for norm in norms)
    return [core * (mean / norm) if norm else core for core, norm in zip(cut, norms)]
