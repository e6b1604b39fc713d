"""Weights of one shape in a tensor whose outer factors they share: `ΔW_n = scale · U G_n Vᵀ`.

The cores G_n are free (Tucker2 over the layers, LoTR, arXiv 2402.01376; FacT's tensor train, arXiv 2212.03145), or
slices of one small core (Tucker3, FacT-TK): `G_n = Σ_k P[n, k] C[:, :, k]`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensorpeft.networks.blocks import on_diagonal
from tensorpeft.networks.dtypes import at_least_float32, widened
from tensorpeft.networks.group import Parts, Tensors, tensors_of
from tensorpeft.networks.low_rank import Factors, pairs_of
from tensorpeft.networks.sketch import Gradient, leading_frames, put_columns
from tensorpeft.networks.update import AbstractLowRankUpdate, AbstractSummableUpdate, SharedFactors

_linalg: Any = torch.linalg  # has no types


class TuckerFactors(SharedFactors):
    """The factors of several tensors of stacked weights, each under its own name: `1024x4096_U` and so on.

    Made without values worth keeping: the method fills them.

    Args:
        rank: r of every mode.
        sizes: name of a tensor -> (number of weights n, out, in).
        has_small_core: False: cores G (n, r, r). True: P (n, r) and C (r, r, r).
        trains_frames: whether U and V are trained, or frozen as they start.
    """

    def __init__(
        self, rank: int, sizes: dict[str, tuple[int, int, int]], has_small_core: bool, trains_frames: bool = True
    ):
        super().__init__()
        self.rank = rank
        self.sizes = sizes
        self.has_small_core = has_small_core
        for name, (count, out, in_) in sizes.items():
            shapes = {"U": (out, rank), "V": (in_, rank), "G": (count, rank, rank)}
            if has_small_core:
                shapes = {"U": (out, rank), "V": (in_, rank), "P": (count, rank), "C": (rank, rank, rank)}
            for factor, shape in shapes.items():
                if factor in "UV" and not trains_frames:
                    self.register_buffer(f"{name}_{factor}", at_least_float32(torch.zeros(shape)))
                else:
                    self.register_parameter(f"{name}_{factor}", nn.Parameter(torch.zeros(shape)))

    @torch.no_grad()
    def set_frames(
        self,
        tensor: str,  # its name
        gradients: Sequence[Gradient],  # of its weights, in the tensor's order
    ) -> None:
        """Put U and V where the gradients' energy is, and start at zero from there: the cores do.

        Of a Tucker3 tensor P becomes the weights' mode of what these frames hold, each column as long as it started.
        """
        factors = tensors_of(self)
        left, right = leading_frames(gradients, self.rank)
        put_columns(factors[f"{tensor}_U"], left)
        put_columns(factors[f"{tensor}_V"], right)
        nn.init.zeros_(factors[f"{tensor}_{'C' if self.has_small_core else 'G'}"])
        if self.has_small_core:
            held = [(left.t() @ part.left) @ part.core @ (part.right.t() @ right) for part in gradients]
            rows: Tensor = _linalg.svd(torch.stack(held).flatten(1), full_matrices=False)[0][:, : self.rank]
            put_columns(factors[f"{tensor}_P"], rows * sqrt(len(held) / self.rank))

    def extra_repr(self) -> str:
        """Modes of every tensor."""
        return f"r {self.rank}; " + "; ".join(
            f"{name}: U {out} · V {in_} · {'P' if self.has_small_core else 'G'} {count}"
            for name, (count, out, in_) in self.sizes.items()
        )


class TuckerMatrixUpdate(AbstractLowRankUpdate):
    """A weight's own Tucker decomposition, `ΔW = scale · U G Vᵀ`; made without values worth keeping but a zero G.

    Args:
        out: rows of the weight.
        in_: columns.
        rank: r of both modes.
        scale: s.
        trains_frames: whether U and V are trained, or frozen as they start.

    Source: FLoRA (arXiv 2405.14739), section 3.2, for a matrix.
    """

    U: Tensor
    V: Tensor

    def __init__(self, out: int, in_: int, rank: int, scale: float, trains_frames: bool = True):
        super().__init__()
        self.scale = scale
        for name, size in (("U", out), ("V", in_)):
            if trains_frames:
                self.register_parameter(name, nn.Parameter(torch.zeros(size, rank)))
            else:
                self.register_buffer(name, at_least_float32(torch.zeros(size, rank)))
        self.G = nn.Parameter(torch.zeros(rank, rank))

    @torch.no_grad()
    def set_frames(self, gradient: Gradient) -> None:
        """Put U and V where the gradient's energy is; the core starts at zero."""
        for factor, frame in zip((self.U, self.V), leading_frames([gradient], len(self.G))):
            put_columns(factor, frame)
        nn.init.zeros_(self.G)

    def factors_from(self, tensors: Mapping[str, Tensor]) -> Factors:
        """Vᵀ, the scaled core and U."""
        return Factors(tensors["V"].mT, tensors["G"] * self.scale, tensors["U"])

    def tensor_name(self) -> str:
        """A tensor of its own for every weight, told by its modes."""
        return self.extra_repr()

    def extra_repr(self) -> str:
        """Modes and rank."""
        return f"U {len(self.U)} · V {len(self.V)}, r {len(self.G)}"


class TuckerUpdate(AbstractSummableUpdate):
    """One weight of a stacked tensor.

    Args:
        shared: the factors.
        tensor: the name of this weight's tensor in them.
        index: its place in the tensor.
        scale: s.
    """

    def __init__(self, shared: TuckerFactors, tensor: str, index: int, scale: float):
        super().__init__(shared)
        self.tensor = tensor
        self.index = index
        self.scale = scale

    def group_key(self) -> Hashable:
        """Its tensor."""
        return self.tensor

    def make_parts(
        self, members: Sequence[TuckerUpdate], own: Sequence[Tensors], shared: Tensors, dtype: torch.dtype | None
    ) -> list[Parts]:
        """The pairs of factors: V is the same for all; U with the cores side by side."""
        up, down = shared[f"{self.tensor}_U"], shared[f"{self.tensor}_V"]
        indices = torch.tensor([member.index for member in members], device=up.device)
        if (cores := shared.get(f"{self.tensor}_G")) is not None:
            cores = cores.index_select(0, indices)
        else:
            rows, small = shared[f"{self.tensor}_P"].index_select(0, indices), shared[f"{self.tensor}_C"]
            cores = (rows @ small.flatten(0, 1).t()).view(-1, *small.shape[:2])
        return pairs_of(Factors(down.t(), cores * self.scale, up), dtype)

    def factors_from(self, tensors: Mapping[str, Tensor]) -> Factors:
        """Vᵀ, the scaled core and U."""
        if (cores := tensors.get(f"{self.tensor}_G")) is not None:
            core = cores[..., self.index, :, :]
        else:
            row = tensors[f"{self.tensor}_P"][..., self.index, :]
            small = tensors[f"{self.tensor}_C"]
            # Of matrices: which product `matmul` takes for tensors of more axes, it decides by `requires_grad`.
            core = torch.unflatten((small.flatten(-3, -2) @ row.unsqueeze(-1)).squeeze(-1), -1, small.shape[-3:-1])
        return Factors(tensors[f"{self.tensor}_V"].mT, core * self.scale, tensors[f"{self.tensor}_U"])

    def sum_shared(self, others: Sequence[TuckerUpdate], weights: Sequence[float]) -> dict[str, Tensor]:
        """U, V and P side by side; the cores, with weights and scales, on the diagonal of larger ones."""
        updates = (self, *others)
        shared = [cast(TuckerFactors, update.shared) for update in updates]
        forms = [(factors.sizes, factors.has_small_core) for factors in shared]
        if any(form != forms[0] for form in forms):
            raise ValueError(f"tensors of the modes {forms} (with a small core or not): expected equal ones.")
        parts = [widened(tensors_of(factors)) for factors in shared]
        scales = [weight * update.scale for weight, update in zip(weights, updates)]
        found = dict[str, Tensor]()
        for key in parts[0]:
            if key[-1] in "UVP":
                found[key] = on_diagonal([part[key] for part in parts], [1])
            else:
                cores = [part[key] * scale for part, scale in zip(parts, scales)]
                found[key] = on_diagonal(cores, [0, 1, 2] if key[-1] == "C" else [1, 2])
        return found

    def tensor_name(self) -> str:
        """The tensor and its modes."""
        shared = cast(TuckerFactors, self.shared)
        count, out, in_ = shared.sizes[self.tensor]
        return f"{self.tensor}: U {out} · V {in_} · {'P' if shared.has_small_core else 'G'} {count}"

    def extra_repr(self) -> str:
        """Which weight of which tensor."""
        return f"{self.tensor}, weight {self.index}"


def set_shared_frames(updates: Mapping[str, TuckerUpdate], gradients: Mapping[str, Gradient]) -> None:
    """`TuckerFactors.set_frames` of every tensor, from the gradients of the weights of these names."""
    tensors: dict[str, list[str]] = {}
    for name, update in sorted(updates.items(), key=lambda item: item[1].index):
        tensors.setdefault(update.tensor, []).append(name)
    for tensor, names in tensors.items():
        shared = cast(TuckerFactors, updates[names[0]].shared)
        shared.set_frames(tensor, [gradients[name] for name in names])
