"""Tensor trains: a vector of many entries as a chain of small cores, and the update whose two factors are such chains.

Core k has shape (b_{k-1}, m_k, b_k), b_0 = b_N = 1, and entry (m_1..m_N), row-major with the first mode slowest, is the
product of the matrices `T1[:, m_1, :] · T2[:, m_2, :] · … · TN[:, m_N, :]`. Source: Oseledets (2011).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorpeft.networks.low_rank import Factors
from tensorpeft.networks.mpo import decompose
from tensorpeft.networks.sketch import Gradient, leading_frames
from tensorpeft.networks.update import AbstractLowRankUpdate


def contract(
    cores: Sequence[Tensor],  # each (*adapters, bond_left, mode, bond_right)
) -> Tensor:  # (*adapters, product of the modes)
    """All entries of a train. Differentiable."""
    chain = cores[0].squeeze(-3)  # (*adapters, entries so far, bond)
    for core in cores[1:]:
        chain = torch.unflatten(chain @ core.flatten(-2), -1, core.shape[-2:]).flatten(-3, -2)
    return chain.squeeze(-1)


def train_bonds(modes: Sequence[int], rank: int) -> list[int]:
    """1, then `rank` between neighbouring cores, or what the exact train has there if that is less, then 1."""
    return [min(prod(modes[:k]), prod(modes[k:]), rank) for k in range(len(modes))] + [1]


def random_train(
    modes: Sequence[int],
    rank: int,
    std: float,
) -> list[Tensor]:  # N cores, each (bond_left, mode, bond_right)
    """Gaussian cores of a train whose entries have mean zero and that standard deviation.

    Each core's is `bond_left^-½`, so that every product of cores keeps its scale; the first core carries `std`.
    """
    bonds = train_bonds(modes, rank)
    stds = [std, *(bond**-0.5 for bond in bonds[1:-1])]
    return [torch.normal(0.0, stds[k], (bonds[k], mode, bonds[k + 1])) for k, mode in enumerate(modes)]


def train_of(
    vector: Tensor,  # (product of the modes,)
    modes: Sequence[int],
    rank: int,
) -> list[Tensor]:  # as `random_train`'s
    """The train nearest to a vector, or nearly, by TT-SVD; all cores but the last are left-orthonormal."""
    # An operator whose rows are one.
    return [core.squeeze(1) for core in decompose(vector.reshape(1, -1), [1] * len(modes), modes, rank)]


def describe_trains(update: nn.Module, num_down: int, num_up: int) -> str:
    """Modes of the trains A (cores `down_1`, …) and B (`up_1`, …) of an update, as in `A 8·8·12·8, B 8·8·12·8`."""
    sides = (("A", "down", num_down), ("B", "up", num_up))
    modes = {
        name: "·".join(str(getattr(update, f"{side}_{k}").shape[1]) for k in range(1, count + 1))
        for name, side, count in sides
    }
    return ", ".join(f"{name} {text}" for name, text in modes.items())


class TensorTrainUpdate(AbstractLowRankUpdate):
    """`ΔW = scale · B A`, the two factors of a LoRA as tensor trains over the modes of all their entries.

    Args:
        down: the cores of A (r, in).
        up: the cores of B (out, r).
        rank: r.
        scale: s.
    """

    def __init__(self, down: Sequence[Tensor], up: Sequence[Tensor], rank: int, scale: float):
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.num_down, self.num_up = len(down), len(up)
        for side, cores in (("down", down), ("up", up)):
            for k, core in enumerate(cores, 1):
                self.register_parameter(f"{side}_{k}", nn.Parameter(core))

    def group_key(self) -> Hashable:
        """The shapes of its cores, and what else it was made with."""
        return self.rank, self.scale, tuple(core.shape for core in self.parameters())

    @torch.no_grad()
    def set_frames(self, gradient: Gradient) -> None:
        """Put A and B where the gradient's energy is, cut to their bonds; B's last core is zero.

        A is as large as LoRA's is in the mean: its rows have the norm 1/√3.
        """
        left, right = leading_frames([gradient], self.rank)
        for side, frame, count in (("down", right.t(), self.num_down), ("up", left, self.num_up)):
            cores = [getattr(self, f"{side}_{k}") for k in range(1, count + 1)]
            modes, bond = [core.shape[1] for core in cores], max(core.shape[2] for core in cores)
            rows, columns = (self.rank, len(right)) if side == "down" else (len(left), self.rank)
            whole = F.pad(frame, (0, columns - frame.shape[1], 0, rows - frame.shape[0]))
            found = train_of(whole.flatten(), modes, bond)
            # The cores before the last are as large as those of a random start: the last one learns at their pace.
            sizes = [sqrt(mode) for mode in modes[:-1]]
            norm = found[-1].square().sum().sqrt().item() * prod(sizes)
            sizes.append(sqrt(self.rank / 3) / norm if side == "down" else 0.0)
            for core, value, size in zip(cores, found, sizes):
                core.copy_(value * size)

    def factors_from(self, tensors: Mapping[str, Tensor]) -> Factors:
        """A, the scale and B: formed once per forward, and kept for backward."""
        down = contract([tensors[f"down_{k}"] for k in range(1, self.num_down + 1)])
        down = torch.unflatten(down, -1, (self.rank, -1))
        up = torch.unflatten(contract([tensors[f"up_{k}"] for k in range(1, self.num_up + 1)]), -1, (-1, self.rank))
        return Factors(down, down.new_full((*down.shape[:-2], self.rank), self.scale), up)

    def tensor_name(self) -> str:
        """Two trains of its own for every weight, told by their modes."""
        return self.extra_repr()

    def extra_repr(self) -> str:
        """Modes, as in `A 8·8·12·8, B 8·8·12·8`."""
        return describe_trains(self, self.num_down, self.num_up)
