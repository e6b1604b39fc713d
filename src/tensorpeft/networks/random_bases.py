"""Weights as combinations of frozen random matrices that a seed stands for, and the update made of two of them.

The entries come from Philox 4x64-10 (Salmon et al., 2011; numpy.random.Philox), a counter-based generator whose raw
output is the same everywhere, made into numbers by exact operations only: the upper 24 bits of each 64-bit word w give
`(w >> 40) · 2⁻²³ − 1`, uniform in [−1, 1). So a seed means the same bases on every machine and device. The key is
(seed, 2 · size) for the bases of A's side, `down`, which are then multiplied by 1 / √size, both in float32, and
(seed, 2 · size + 1) for `up`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tensorpeft.networks.low_rank import Factors
from tensorpeft.networks.update import AbstractLowRankUpdate, SharedFactors, keeping_dtype

_SIDES = {"down": 0, "up": 1}


def random_basis(
    seed: int,  # from 0 to 2**64 - 1
    side: str,  # "down" or "up"
    size: int,
    shape: tuple[int, ...],
) -> Tensor:  # of that shape, float32, uniform in [-1, 1)
    """The bases of one side and size: Philox with the key (seed, 2 · size + side), from its counter's start.

    Under `torch.device("meta")` a shape and no numbers, as all that torch draws there.

    >>> random_basis(0, "down", 4, (1, 2, 4)).shape
    torch.Size([1, 2, 4])
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(shape)
    key = np.array([seed, 2 * size + _SIDES[side]], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(int(np.prod(shape)))
    numbers = (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return torch.from_numpy(numbers).view(shape)  # pyright: ignore[reportUnknownMemberType]  # torch's own has no types


class RandomBases(SharedFactors):
    """The bases of all sizes that an adapter needs: made from the seed, shared by its layers, in no checkpoint.

    Args:
        seed: what they are made from.
        num_bases: k, on each side.
        rank: r.
        shapes: (out, in) of the weights.
    """

    def __init__(self, seed: int, num_bases: int, rank: int, shapes: Iterable[tuple[int, int]]):
        super().__init__()
        self.seed = seed
        self.num_bases = num_bases
        self.rank = rank
        outs, ins = zip(*shapes)
        for size in sorted(set(ins)):
            # The variance of LoRA's A for one basis; the coefficients keep it (see `NolaConfig`).
            basis = random_basis(seed, "down", size, (num_bases, rank, size)) * size**-0.5
            self.register_buffer(f"down_{size}", basis, persistent=False)
        for size in sorted(set(outs)):
            basis = random_basis(seed, "up", size, (num_bases, size, rank))
            self.register_buffer(f"up_{size}", basis, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomBases:
        """As torch's, but the dtype stays: a loaded adapter makes these very numbers again."""
        return super()._apply(keeping_dtype(fn), recurse)  # pyright: ignore[reportUnknownMemberType]

    def extra_repr(self) -> str:
        """Seed, number and rank."""
        return f"seed {self.seed}, {self.num_bases} bases of rank {self.rank} per side"


class RandomBasesUpdate(AbstractLowRankUpdate):
    """`ΔW = scale · (Σ_i α_i A_i) (Σ_j β_j B_j)`: only the coefficients are trained, and saved.

    Args:
        shared: the bases A_i (out, r) and B_j (r, in).
        out: rows of the weight.
        in_: columns.
        scale: s.
    """

    def __init__(self, shared: RandomBases, out: int, in_: int, scale: float):
        super().__init__(shared)
        self.out = out
        self.in_ = in_
        self.scale = scale
        self.alpha = nn.Parameter(torch.zeros(shared.num_bases))
        self.beta = nn.Parameter(torch.zeros(shared.num_bases))

    def factors_from(self, tensors: Mapping[str, Tensor]) -> Factors:
        """Both combinations, each a product of the coefficients with the bases, and the scale."""
        down, up = tensors[f"down_{self.in_}"], tensors[f"up_{self.out}"]
        down = _combined(tensors["beta"], down)
        return Factors(down, down.new_full(down.shape[:-1], self.scale), _combined(tensors["alpha"], up))

    def tensor_name(self) -> str:
        """The bases it combines."""
        shared = cast(RandomBases, self.shared)
        return f"{shared.num_bases} x ({self.out}, {shared.rank}) · {shared.num_bases} x ({shared.rank}, {self.in_})"

    def extra_repr(self) -> str:
        """Its shape."""
        return f"out {self.out}, in {self.in_}"


def _combined(
    coefficients: Tensor,  # (*adapters, k)
    bases: Tensor,  # (*adapters, k, m, n)
) -> Tensor:  # (*adapters, m, n)
    # Layers may lie on several devices: the few coefficients go to the bases, not the bases to them.
    coefficients = coefficients.to(bases.device)
    rows = coefficients.unsqueeze(-2) @ bases.flatten(-2).to(coefficients.dtype)
    return torch.unflatten(rows.squeeze(-2), -1, bases.shape[-2:])
