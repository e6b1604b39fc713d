"""A CP tensor over the weights of many layers: one set of factors, of which every weight is a low-rank matrix.

The entry of layer l and projection m at (model feature a, head h, head feature b) is
`Σ_k A[a, k] B[b, k] C_H[h, k] C_L[l, k] C_M[m, k]`. Source: LoRTA (arXiv 2410.04060), section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensorpeft.networks.dtypes import widened
from tensorpeft.networks.group import tensors_of
from tensorpeft.networks.sketch import Gradient
from tensorpeft.networks.slices import AbstractSliceFactors, AbstractSliceUpdate, fold_gradients, rows_of

_linalg: Any = torch.linalg  # has no types

# Alternating least squares of a start: what is wanted are directions, not digits.
_SWEEPS, _RIDGE = 12, 1e-6


class CpFactors(AbstractSliceFactors):
    """The factors of several CP tensors, each under its own name: `attention_A` and so on.

    Args:
        rank: r, the number of terms.
        sizes: name of a tensor -> its modes, {factor: size}: A the model dimension, B the features of a head, C_H the
            heads, C_L the layers, C_M the projections. A tensor without one of the last three modes has no such factor.
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

    @torch.no_grad()
    def set_frames(
        self,
        tensor: str,  # its name
        members: Sequence[AbstractSliceUpdate],  # its weights
        gradients: Sequence[Gradient],  # of each
    ) -> None:
        """Put A and the coefficients C where a CP decomposition of the gradients' tensor has them; B starts at zero.

        The decomposition is that of the tensor between A's leading directions, by alternating least squares. Every
        column is as long as it started in the mean, so that the terms learn at one pace.
        """
        modes = self.sizes[tensor]
        frame, folded = fold_gradients(members, gradients, self.rank, modes)
        found: dict[str, Tensor] = dict(zip(("C_M", "C_L", "C_H", "B", "A"), decompose(folded, self.rank)))
        found["A"] = frame @ found["A"]
        for name in modes:
            factor = tensors_of(self)[f"{tensor}_{name}"]
            factor.copy_(_of_length_one(found[name]) * sqrt(modes[name] / (3 * self.rank)))
        nn.init.zeros_(tensors_of(self)[f"{tensor}_B"])

    def extra_repr(self) -> str:
        """Modes of every tensor."""
        return f"r {self.rank}; " + "; ".join(
            f"{name}: " + " · ".join(f"{factor} {size}" for factor, size in modes.items())
            for name, modes in self.sizes.items()
        )


class CpUpdate(AbstractSliceUpdate):
    """One weight of a CP tensor: `ΔW = scale · K diag(C_L[layer] ∘ C_M[projection]) Aᵀ`, or its transpose.

    K is the Khatri-Rao product `C_H ⊙ B` of its heads. A always meets the model dimension.
    """

    def outer(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A."""
        return tensors[f"{self.tensor}_A"]

    def inner(self, tensors: Mapping[str, Tensor], heads: int) -> Tensor:
        """`C_H ⊙ B`, or B."""
        features, per_head = tensors[f"{self.tensor}_B"], tensors.get(f"{self.tensor}_C_H")
        return features.unsqueeze(1) if per_head is None else per_head[:heads, None] * features

    def cores(self, tensors: Mapping[str, Tensor], layer: int | Tensor, projection: int | Tensor) -> Tensor:
        """The coefficients of layer and projection."""
        places = {"C_L": layer, "C_M": projection}
        known = {name: tensors.get(f"{self.tensor}_{name}") for name in places}
        rows = [rows_of(tensor, places[name]) for name, tensor in known.items() if tensor is not None]
        if not rows:  # a tensor of one weight
            model = self.outer(tensors)
            return model.new_ones(model.shape[1])
        return rows[0] if len(rows) == 1 else rows[0] * rows[1]

    def sum_shared(self, others: Sequence[CpUpdate], weights: Sequence[float]) -> dict[str, Tensor]:
        """The terms of all, side by side; each one's A with its weight and scale."""
        updates = (self, *others)
        shared = [cast(CpFactors, update.shared) for update in updates]
        forms = [(type(factors).__name__, factors.sizes) for factors in shared]
        if any(form != forms[0] for form in forms):
            raise ValueError(f"tensors of the modes {forms}: expected equal ones.")
        parts = [widened(tensors_of(factors)) for factors in shared]
        factors = [weight * update.scale for weight, update in zip(weights, updates)]
        return {
            key: torch.cat([part[key] * (k if key.endswith("_A") else 1) for part, k in zip(parts, factors)], dim=1)
            for key in parts[0]
        }

    def tensor_name(self) -> str:
        """The tensor and its modes."""
        modes = cast(CpFactors, self.shared).sizes[self.tensor]
        return f"{self.tensor}: " + " · ".join(f"{factor} {size}" for factor, size in modes.items())


@torch.no_grad()
def decompose(
    tensor: Tensor,
    rank: int,
    start: Sequence[Tensor] | None = None,  # as the result, the first mode is not looked at; None: noise
    seed: int = 0,  # of the noise
    sweeps: int = _SWEEPS,
) -> list[Tensor]:  # per mode (size, rank)
    """A CP decomposition by alternating least squares, the same at every call; near a best one, not always there."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(size, rank, generator=generator).to(tensor) for size in tensor.shape]
    factors = noise if start is None else list(start)
    letters = "abcdefgh"[: tensor.ndim]
    for _ in range(sweeps):
        for mode, letter in enumerate(letters):
            # The largest first: einsum goes from left to right, and what is left of the tensor is then smallest.
            others = sorted((k for k in range(tensor.ndim) if k != mode), key=lambda k: -tensor.shape[k])
            inputs = ",".join(f"{letters[k]}r" for k in others)
            product = torch.einsum(f"{letters},{inputs}->{letter}r", tensor, *(factors[k] for k in others))
            gram = torch.stack([factors[k].t() @ factors[k] for k in others]).prod(0)
            gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
            factors[mode] = cast(Tensor, _linalg.solve(gram, product.t())).t()
            if mode < tensor.ndim - 1:  # the last one carries the scale
                factors[mode] = _of_length_one(factors[mode])
    return factors


def _of_length_one(columns: Tensor) -> Tensor:
    return columns / cast(Tensor, _linalg.vector_norm(columns, dim=0)).clamp_min(torch.finfo(columns.dtype).tiny)
