"""Tucker tensors over the weights of many layers, with a rank for every mode.

The entry of layer l and projection m at (outer feature a, head h, feature b) is
`Σ G[p, q, s, t, u] A[a, p] B[b, q] C_H[h, s] C_M[m, t] C_L[l, u]`. Source: TensLoRA (arXiv 2509.19391).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tensorpeft.networks.blocks import on_diagonal
from tensorpeft.networks.dtypes import widened
from tensorpeft.networks.sketch import Gradient, leading_columns, put_columns
from tensorpeft.networks.slices import AbstractSliceFactors, AbstractSliceUpdate, fold_gradients, rows_of

# Alternations of a start, and how many of A's directions it chooses among, as a multiple of r.
_SWEEPS, _WIDTH = 5, 2


class TuckerSliceFactors(AbstractSliceFactors):
    """Core and factors of several tensors, each under its own name: `768x768_G`, `768x768_A` and so on.

    The core G is zero; the factors are made without values worth keeping: the method fills them.

    Args:
        sizes: name of a tensor -> its modes in the order of the core's axes, {factor: size}: A the outer side, B the
            other or the features of a head, then, where there are such modes, C_H, C_M, C_L.
        ranks: name of a tensor -> {factor: rank}.
    """

    def __init__(self, sizes: dict[str, dict[str, int]], ranks: dict[str, dict[str, int]]):
        super().__init__()
        self.sizes = sizes
        self.ranks = ranks
        for name, modes in sizes.items():
            for factor, size in modes.items():
                self.register_parameter(f"{name}_{factor}", nn.Parameter(torch.zeros(size, ranks[name][factor])))
            core = torch.zeros([ranks[name][factor] for factor in modes])
            self.register_parameter(f"{name}_G", nn.Parameter(core))

    @torch.no_grad()
    def set_frames(
        self,
        tensor: str,  # its name
        members: Sequence[AbstractSliceUpdate],  # its weights
        gradients: Sequence[Gradient],  # of each
    ) -> None:
        """Put the factors where a Tucker decomposition of the gradients' tensor has them; the core is zero.

        The decomposition is that of the tensor between A's leading directions, of which there are more than r.
        """
        modes, ranks = self.sizes[tensor], self.ranks[tensor]
        frame, folded = fold_gradients(members, gradients, _WIDTH * ranks["A"], modes)
        names = ["C_M", "C_L", "C_H", "B", "A"]
        found = dict(zip(names, decompose(folded, [ranks.get(name, 1) for name in names])))
        found["A"] = frame @ found["A"]
        for name in modes:
            put_columns(getattr(self, f"{tensor}_{name}"), found[name])
        nn.init.zeros_(getattr(self, f"{tensor}_G"))

    def describe(self, name: str) -> str:
        """Modes and ranks, as in `A 768 (8) · B 768 (8) · C_L 12 (4)`."""
        return " · ".join(f"{factor} {size} ({self.ranks[name][factor]})" for factor, size in self.sizes[name].items())

    def extra_repr(self) -> str:
        """Modes and ranks of every tensor."""
        return "; ".join(f"{name}: {self.describe(name)}" for name in self.sizes)


class TuckerSliceUpdate(AbstractSliceUpdate):
    """One weight of a Tucker tensor: the core is contracted with the rows of layer and projection, no tensor formed."""

    def outer(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A."""
        return tensors[f"{self.tensor}_A"]

    def inner(self, tensors: Mapping[str, Tensor], heads: int) -> Tensor:
        """B, or the Kronecker product `C_H ⊗ B`, the head slowest."""
        features, per_head = tensors[f"{self.tensor}_B"], tensors.get(f"{self.tensor}_C_H")
        if per_head is None:
            return features.unsqueeze(1)
        return (features[:, :, None] * per_head[:heads, None, None]).flatten(2)

    def cores(self, tensors: Mapping[str, Tensor], layer: int | Tensor, projection: int | Tensor) -> Tensor:
        """G without the axes of layers and projections."""
        places = {"C_M": projection, "C_L": layer}
        known = {name: tensors.get(f"{self.tensor}_{name}") for name in places}
        rows = [rows_of(tensor, places[name]) for name, tensor in known.items() if tensor is not None]
        core = tensors[f"{self.tensor}_G"]
        if not rows:  # a tensor of one weight
            return core.flatten(1).t()
        row = rows[0] if len(rows) == 1 else (rows[0].unsqueeze(-1) * rows[1].unsqueeze(-2)).flatten(-2)
        matrix = core.flatten(core.ndim - len(rows)).flatten(0, -2)  # (r_A · r_B …, r_M · r_L)
        # How a product with a vector rounds, depends on where in memory the matrix lies, as a file may have it.
        found = (matrix * row).sum(1) if row.ndim == 1 else row @ matrix.t()
        return found.view(*row.shape[:-1], len(core), -1).mT

    def sum_shared(self, others: Sequence[TuckerSliceUpdate], weights: Sequence[float]) -> dict[str, Tensor]:
        """The factors side by side; the cores, with weights and scales, on the diagonal of larger ones."""
        updates = (self, *others)
        shared = [cast(TuckerSliceFactors, update.shared) for update in updates]
        forms = [(type(factors).__name__, factors.sizes) for factors in shared]
        if any(form != forms[0] for form in forms):
            raise ValueError(f"tensors of the modes {forms}: expected equal ones.")
        parts = [widened(dict(factors.named_parameters())) for factors in shared]
        found = dict[str, Tensor]()
        for key in parts[0]:
            blocks = [part[key] for part in parts]
            if key.endswith("_G"):
                blocks = [core * weight * update.scale for core, weight, update in zip(blocks, weights, updates)]
            found[key] = on_diagonal(blocks, range(blocks[0].ndim) if key.endswith("_G") else [1])
        return found

    def tensor_name(self) -> str:
        """The tensor, its modes and their ranks."""
        return f"{self.tensor}: {cast(TuckerSliceFactors, self.shared).describe(self.tensor)}"


@torch.no_grad()
def decompose(
    tensor: Tensor,
    ranks: Sequence[int],  # of each mode; more than its size is its size
) -> list[Tensor]:  # per mode (size, rank), orthonormal columns
    """The factors of a Tucker decomposition. Source: HOOI (De Lathauwer et al., 2000), begun at the HOSVD."""
    found = [leading_columns([tensor.movedim(axis, 0).flatten(1)], rank) for axis, rank in enumerate(ranks)]
    for _ in range(_SWEEPS):
        for axis, rank in enumerate(ranks):
            part = tensor
            for other, factor in enumerate(found):
                if other != axis:
                    part = (part.movedim(other, -1) @ factor).movedim(-1, other)
            found[axis] = leading_columns([part.movedim(axis, 0).flatten(1)], rank)
    return found
