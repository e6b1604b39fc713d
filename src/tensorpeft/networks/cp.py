"""A CP tensor over the weights of many layers: one set of factors, of which every weight is a low-rank matrix.

The entry of layer l and projection m at (model feature a, head h, head feature b) is
`Σ_k A[a, k] B[b, k] C_H[h, k] C_L[l, k] C_M[m, k]`. Source: LoRTA (arXiv 2410.04060), section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from math import sqrt
from typing import cast

import torch
from torch import Tensor, nn

from tensorpeft.networks.group import Parts, Tensors, tensors_of
from tensorpeft.networks.low_rank import Factors, Pair
from tensorpeft.networks.update import AbstractSummableUpdate, SharedFactors


class CpFactors(SharedFactors):
    """The factors of several CP tensors, each under its own name: `attention_A` and so on.

    Args:
        rank: r, the number of terms.
        sizes: name of a tensor -> its modes, {factor: size}: A the model dimension, B the features of a head, C_H the
            heads, C_L the layers, C_M the projections. A tensor without heads has no C_H.
        is_zero: whether B starts at zero, so that every weight does. If not, B starts as A does.
        frozen: factors that stay as they start, such as A.
    """

    def __init__(self, rank: int, sizes: dict[str, dict[str, int]], is_zero: bool = True, frozen: Collection[str] = ()):
        super().__init__()
        self.rank = rank
        self.sizes = sizes
        for name, modes in sizes.items():
            for factor, size in modes.items():
                # Kaiming's bound for r inputs with a = √5, for every factor.
                start = torch.empty(size, rank).uniform_(-1 / sqrt(rank), 1 / sqrt(rank))
                if factor in frozen:
                    self.register_buffer(f"{name}_{factor}", start)
                else:
                    self.register_parameter(f"{name}_{factor}", nn.Parameter(start))
            if is_zero:
                nn.init.zeros_(getattr(self, f"{name}_B"))

    def extra_repr(self) -> str:
        """Modes of every tensor."""
        return f"r {self.rank}; " + "; ".join(
            f"{name}: " + " · ".join(f"{factor} {size}" for factor, size in modes.items())
            for name, modes in self.sizes.items()
        )


class CpUpdate(AbstractSummableUpdate):
    """One weight of a CP tensor: `ΔW = scale · K diag(C_L[layer]) Aᵀ`, of rank at most r, or its transpose.

    K (inner dimension, r) stacks the rows of the weight's projections; for a single one it is the Khatri-Rao product
    `C_H ⊙ B` of its heads, times C_M. A always meets the model dimension.

    Args:
        shared: the factors.
        tensor: the name of this weight's tensor in them.
        layer: row of C_L.
        projections: rows of C_M, one unless the weight is a fused projection.
        heads: the heads of each projection, the first so many rows of C_H; ignored where there is no C_H.
        scale: s.
        inner_is_out: whether K is on the output side (query, key, value) or A is (output).
        interleaved: whether a fused projection has each head's rows of all projections together; without heads, each
            hidden unit's.
    """

    def __init__(
        self,
        shared: CpFactors,
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

    def factors_from(self, tensors: Mapping[str, Tensor]) -> Factors:
        """A and K on their sides, the coefficients of layer and projection between them."""
        model, layers, coefficients = (tensors[f"{self.tensor}_{name}"] for name in ("A", "C_L", "C_M"))
        core = layers[..., self.layer, :] * self.scale
        if len(self.projections) == 1:
            core = core * coefficients[..., self.projections[0], :]
            inner = self._inner(tensors, self.heads[0]).flatten(-3, -2)
        else:
            parts = [
                self._inner(tensors, heads) * coefficients[..., projection, None, None, :]
                for projection, heads in zip(self.projections, self.heads)
            ]
            axis = -3 if f"{self.tensor}_C_H" in tensors else -2  # around each head, or each hidden unit
            inner = torch.stack(parts, axis) if self.interleaved else torch.cat(parts, -3)
            inner = inner.flatten(-4, -2) if self.interleaved else inner.flatten(-3, -2)
        return Factors(model.mT, core, inner) if self.inner_is_out else Factors(inner.mT, core, model)

    def sum_shared(self, others: Sequence[CpUpdate], weights: Sequence[float]) -> dict[str, Tensor]:
        """The terms of all, side by side; each one's C_L with its weight and scale."""
        updates = (self, *others)
        shared = [cast(CpFactors, update.shared) for update in updates]
        if any(factors.sizes != shared[0].sizes for factors in shared):
            raise ValueError(f"tensors of the modes {[factors.sizes for factors in shared]}: expected equal ones.")
        parts = [tensors_of(factors) for factors in shared]
        factors = [weight * update.scale for weight, update in zip(weights, updates)]
        return {
            key: torch.cat([part[key] * (k if key.endswith("_C_L") else 1) for part, k in zip(parts, factors)], dim=1)
            for key in parts[0]
        }

    def group_key(self) -> Hashable | None:
        """Of one tensor, on one side of it, with as many heads; fused projections are made alone."""
        return (self.tensor, self.heads, self.inner_is_out) if len(self.projections) == 1 else None

    def make_parts(
        self, members: Sequence[CpUpdate], own: Sequence[Tensors], shared: Tensors, dtype: torch.dtype | None
    ) -> list[Parts]:
        """The pairs of factors: A and K are the same for all, but for the coefficients of layer and projection."""
        if len(members) == 1:
            return super().make_parts(members, own, shared, dtype)
        model, layers, coefficients = (shared[f"{self.tensor}_{name}"] for name in ("A", "C_L", "C_M"))
        places = [(member.layer, member.projections[0]) for member in members]
        layer, projection = torch.tensor(places, device=layers.device).unbind(1)
        core = layers.index_select(0, layer) * self.scale * coefficients.index_select(0, projection)
        inner = self._inner(shared, self.heads[0]).flatten(-3, -2)
        down, up = (model, inner) if self.inner_is_out else (inner, model)
        pair = Pair(down.t().to(dtype or down.dtype), (up * core.unsqueeze(1)).to(dtype or up.dtype))
        return list(zip(pair.down.expand(len(members), -1, -1).unbind(), pair.up.unbind()))

    def _inner(self, tensors: Mapping[str, Tensor], heads: int) -> Tensor:  # (heads, head features, r)
        features = tensors[f"{self.tensor}_B"].unsqueeze(-3)
        per_head = tensors.get(f"{self.tensor}_C_H")
        return features if per_head is None else per_head[..., :heads, None, :] * features

    def tensor_name(self) -> str:
        """The tensor and its modes."""
        modes = cast(CpFactors, self.shared).sizes[self.tensor]
        return f"{self.tensor}: " + " · ".join(f"{factor} {size}" for factor, size in modes.items())

    def extra_repr(self) -> str:
        """Which weight of which tensor."""
        return f"{self.tensor}, layer {self.layer}, projection {', '.join(map(str, self.projections))}"
