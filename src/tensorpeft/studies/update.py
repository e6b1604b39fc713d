"""``tensorpeft inspect update``: how much of what training changes each method could reach, before it is trained.

Of some weights: G, the gradient on some rows; H, that on as many others; D, what some steps of full fine-tuning
changed. A method at its start moves, to first order, in a linear space of matrices: it can reach the share of the
energy of H and of D that lies in it. Beside it stands the best that any values of some methods' factors reach of D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod

import torch
from scipy.cluster.hierarchy import leaves_list, ward
from torch import Tensor

from tensorpeft.modes import bond_dimensions, factor_modes
from tensorpeft.networks.cp import decompose as cp
from tensorpeft.networks.mpo import decompose
from tensorpeft.networks.sketch import Gradient, exact, leading_columns, leading_frames

Share = Callable[[Tensor], float]  # of the energy of a matrix (out, in)
_Modes = tuple[tuple[int, ...], tuple[int, ...]]  # of the output, of the input
_CLUSTERED_BY = 8  # singular vectors
_SWEEPS, _CP_SWEEPS, _STARTS = 5, 50, 3


@dataclass(frozen=True)
class Sizes:
    """Of the networks that are looked at.

    Args:
        bond: R of the matrix product operators, and of the tensor train.
        num_cores: of the operators; the train has as many for its rows, and as many for its columns.
        middle: the train's bond between its rows and its columns, where it is wider there than elsewhere.
        rank: of the low-rank matrix; beside it stands the one of the operator's size.
        frames: r of frames per weight.
        shared_frames: r of frames that all weights of a kind share, and of the other networks over all of them.
    """

    bond: int = 16
    num_cores: int = 5
    middle: int = 64
    rank: int = 2
    frames: int = 8
    shared_frames: int = 16


@dataclass(frozen=True)
class Seen:
    """One weight, float32.

    Args:
        kind: what it shares with the same weight of other layers.
        weight: W0 (out, in).
        gradient: G, on some rows.
        sketched: the same by `networks.sketch`.
        other: H, on other rows.
        update: D, what full fine-tuning changed; None: it was not run.
    """

    kind: str
    weight: Tensor
    gradient: Tensor
    sketched: Gradient
    other: Tensor
    update: Tensor | None


@dataclass(frozen=True)
class Reach:
    """A row of the table, of all weights of a kind together.

    Args:
        name: what.
        trained: numbers per weight.
        other: share of H's energy; None: it says nothing, being made for D.
        update: share of D's; None: there is none.
    """

    name: str
    trained: int
    other: float | None
    update: float | None


@torch.no_grad()
def reaches(
    weights: Sequence[Seen],  # of one kind, and one shape
    sizes: Sizes,
) -> list[Reach]:
    """The table of a kind of weights."""
    out, in_ = weights[0].weight.shape
    modes = factor_modes(out, sizes.num_cores), factor_modes(in_, sizes.num_cores)
    bonds = bond_dimensions(*modes, sizes.bond)
    mpo = sum(prod(part) for part in zip(bonds[:-1], *modes, bonds[1:]))
    dimension = mpo - sum(bond * bond for bond in bonds[1:-1])  # of its space: a bond's basis may be any
    found = [
        Reach(
            name,
            trained,
            _mean(shares, [weight.other for weight in weights]),
            _mean(shares, [weight.update for weight in weights]),
        )
        for name, trained, shares in _spaces(weights, sizes, modes, mpo, dimension)
    ]
    updates = [weight.update for weight in weights]
    if any(update is None for update in updates):
        return found
    best = _best(weights, sizes, modes, mpo)
    return found + [Reach(name, trained, None, _mean(shares, updates)) for name, trained, shares in best]


def _spaces(
    weights: Sequence[Seen], sizes: Sizes, modes: _Modes, mpo: int, dimension: int
) -> list[tuple[str, int, list[Share]]]:  # name, trained per weight, a share per weight
    """What methods can move at their start."""
    out, in_ = weights[0].weight.shape
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(out, in_, generator=generator) for _ in weights]
    gradients, sketches = [exact(weight.gradient) for weight in weights], [weight.sketched for weight in weights]

    def tangent_spaces(points: Sequence[Tensor]) -> list[Share]:
        return [TangentSpace(decompose(point, *modes, sizes.bond)).share for point in points]

    def between(frames: Sequence[tuple[Tensor, Tensor]]) -> list[Share]:
        return [partial(_share_between, *pair) for pair in frames]

    def own(matrices: Sequence[Gradient], rank: int) -> list[Share]:
        return between([leading_frames([matrix], rank) for matrix in matrices])

    random: list[Share] = [lambda matrix: dimension / (out * in_)] * len(weights)
    lora_r = _rank_within(mpo, out, in_)
    lora: list[Share] = [lambda matrix: lora_r / in_] * len(weights)
    rights = [leading_frames([gradient], lora_r)[1] for gradient in gradients]
    own_r, all_r, large_r = sizes.frames, sizes.shared_frames, min(isqrt(mpo), out, in_)
    shared = [leading_frames(matrices, all_r) for matrices in (gradients, sketches)]
    return [
        (f"MPO of the weight, R={sizes.bond}", mpo, tangent_spaces([weight.weight for weight in weights])),
        (f"MPO of a Gaussian matrix, R={sizes.bond}", mpo, tangent_spaces(noise)),
        ("a random subspace of that size", mpo, random),
        (f"MPO of the gradient, R={sizes.bond}", mpo, tangent_spaces([weight.gradient for weight in weights])),
        (f"LoRA r={lora_r}", lora_r * (out + in_), lora),
        (
            f"LoRA r={lora_r}, A from the gradient",
            lora_r * (out + in_),
            [partial(_share_between, None, right) for right in rights],
        ),
        (f"gradient's frames, r={large_r}, core alone", large_r**2, own(gradients, large_r)),
        (f"gradient's frames, r={own_r}, core alone", own_r**2, own(gradients, own_r)),
        ("the same, sketched", own_r**2, own(sketches, own_r)),
        (f"weight's frames (LoRA-XS), r={own_r}", own_r**2, own([exact(weight.weight) for weight in weights], own_r)),
        (f"one pair of frames for all, r={all_r}", all_r**2, between([shared[0]] * len(weights))),
        ("the same, sketched", all_r**2, between([shared[1]] * len(weights))),
    ]


def _best(
    weights: Sequence[Seen], sizes: Sizes, modes: _Modes, mpo: int
) -> list[tuple[str, int, list[Share]]]:  # as `_spaces`
    """What any values of the factors reach of the update, in bases that are known before training."""
    out, in_ = weights[0].weight.shape
    by_mpo = partial(_kept_by_mpo, *modes, sizes.bond)
    bases = [(left, right.t()) for left, _, right in (torch.linalg.svd(weight.gradient) for weight in weights)]
    orders = [(_clustered(left), _clustered(right)) for left, right in bases]
    train = [*modes[0], *modes[1]]
    middle = [sizes.middle if k == sizes.num_cores else sizes.bond for k in range(1, len(train))]
    narrow, wide = (bond_dimensions([1] * len(train), train, bond) for bond in (sizes.bond, middle))
    rows = list[tuple[str, int, list[Share]]]()
    most = partial(_bound_of_mpos, *modes, sizes.bond)
    for name, shares in (
        (f"best MPO of D, R={sizes.bond}", [by_mpo] * len(weights)),
        ("no MPO keeps more than", [most] * len(weights)),
        ("best, rows and columns clustered", [partial(_in_order, *order, by_mpo) for order in orders]),
        ("no MPO keeps more there than", [partial(_in_order, *order, most) for order in orders]),
        ("best, in the gradient's singular bases", [partial(_in_bases, *pair, by_mpo) for pair in bases]),
        ("no MPO keeps more there than", [partial(_in_bases, *pair, most) for pair in bases]),
    ):
        rows.append((name, mpo, shares))
    for name, bonds in ((f"R={sizes.bond}", narrow), (f"middle bond {sizes.middle}", wide)):
        size = sum(prod(part) for part in zip(bonds, train, bonds[1:]))
        by_train = partial(_kept_by_train, train, bonds[1:-1])
        rows.append((f"best train of D, rows | columns, {name}", size, [by_train] * len(weights)))
    for rank in (sizes.rank, _rank_within(mpo, out, in_)):
        shares: list[Share] = [partial(_kept_by_rank, rank)] * len(weights)
        rows.append((f"best matrix of rank {rank} of D (LoRA)", rank * (out + in_), shares))
    return rows + _best_of_all([weight.update for weight in weights if weight.update is not None], sizes.shared_frames)


def _best_of_all(updates: Sequence[Tensor], rank: int) -> list[tuple[str, int, list[Share]]]:  # as `_spaces`
    """What one tensor over all these weights reaches of their updates; what is shared counts for each by its part.

    The Tucker2 tensor is near the best there is; the CP tensor is the best that was found from several starts.
    """
    count, (out, in_) = len(updates), updates[0].shape
    rank = min(rank, out, in_)
    left, right = leading_frames([exact(update) for update in updates], rank)
    for _ in range(_SWEEPS):  # higher-order orthogonal iteration (De Lathauwer et al., 2000)
        left = leading_columns([update @ right for update in updates], rank)
        right = leading_columns([update.t() @ left for update in updates], rank)
    per_layer, rows, columns = _best_cp(torch.stack(list(updates)), rank)
    return [
        (
            f"best U G Vᵀ, U and V of all {count}, r={rank} (LoTR, FacT, MetaTT)",
            rank**2 + round(rank * (out + in_) / count),
            [partial(_share_between, left, right)] * count,
        ),
        (
            f"CP of all {count}, r={rank} (LoRTA), found",
            rank + round(rank * (out + in_) / count),
            [partial(_kept_by, rows * weights @ columns.t()) for weights in per_layer],
        ),
    ]


def _best_cp(updates: Tensor, rank: int) -> list[Tensor]:  # (count, out, in) -> as `cp`
    """From noise, and from a low-rank matrix of every weight: side by side they are a CP tensor, too."""
    count = len(updates)
    starts: list[list[Tensor] | None] = [None] * _STARTS
    if each := rank // count:
        left, _, right = torch.linalg.svd(updates, full_matrices=False)
        sides = (left[:, :, :each], right[:, :each].mT)
        noise = torch.Generator().manual_seed(0)
        factors = [torch.randn(size, rank, generator=noise).to(updates) for size in updates.shape]
        for factor, side in zip(factors[1:], sides):
            factor[:, : count * each] = side.transpose(0, 1).flatten(1)
        starts.append(factors)
    found = [cp(updates, rank, start, seed, _CP_SWEEPS) for seed, start in enumerate(starts)]
    return min(found, key=lambda factors: _energy(updates - torch.einsum("ar,br,cr->abc", *factors)))


class TangentSpace:
    """That of all MPOs of these bonds, at one: the matrices that small changes of its cores add.

    Args:
        cores: of the point, each (bond_left, out_mode, in_mode, bond_right), left-orthonormal but for the last, as
            `decompose` gives them.

    Source: the projection of Lubich, Oseledets and Vandereycken (2015), equation 3.4.
    """

    def __init__(self, cores: Sequence[Tensor]):
        self._out, self._in = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
        self._left = [core.flatten(1, 2).double() for core in cores]
        self._right = list(self._left)
        for k in range(len(cores) - 1, 0, -1):
            bond, pair, bond_right = self._right[k].shape
            q, r = torch.linalg.qr(self._right[k].reshape(bond, -1).t())
            self._right[k] = q.t().reshape(bond, pair, bond_right)
            self._right[k - 1] = torch.einsum("apb,cb->apc", self._right[k - 1], r)

    def share(self, matrix: Tensor) -> float:
        """‖P Z‖² / ‖Z‖² of a matrix Z."""
        tensor = _interleaved(matrix.double(), self._out, self._in)
        # Z, contracted with the orthonormal cores on the right of each site, and then with those on its left.
        rights = [tensor.unsqueeze(-1)]
        for core in reversed(self._right[1:]):
            rights.append(torch.einsum("...pb,apb->...a", rights[-1], core))
        rights.reverse()  # rights[k]: (n_1, …, n_{k+1}, bond)
        energy = 0.0
        for k in range(len(self._left)):
            site = rights[k].unsqueeze(0)  # (bond 1, n_1, …, n_{k+1}, bond)
            for core in self._left[:k]:
                site = torch.einsum("ap...,apb->b...", site, core)
            energy += _energy(site)
            if k < len(self._left) - 1:  # what the next sites move, too
                energy -= _energy(torch.einsum("apc,apb->bc", site, self._left[k]))
        return energy / _energy(tensor)


def _interleaved(matrix: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:  # (i_1 j_1, i_2 j_2, …)
    count = len(out_modes)
    tensor = matrix.reshape(*out_modes, *in_modes)
    tensor = tensor.permute(*(axis for k in range(count) for axis in (k, count + k)))
    return tensor.reshape([i * j for i, j in zip(out_modes, in_modes)])


def _rank_within(numbers: int, out: int, in_: int) -> int:
    """Of the largest LoRA that trains no more numbers."""
    return max(1, min(numbers // (out + in_), out, in_))


def _share_between(left: Tensor | None, right: Tensor, matrix: Tensor) -> float:  # None: all rows
    between = matrix @ right
    return _energy(between if left is None else left.t() @ between) / _energy(matrix)


def _energy(tensor: Tensor) -> float:
    return tensor.double().square().sum().item()


def _mean(shares: Sequence[Share], matrices: Sequence[Tensor | None]) -> float | None:
    """The share of the energy of all matrices together."""
    given = [matrix for matrix in matrices if matrix is not None]
    if len(given) < len(matrices):
        return None
    energies = [_energy(matrix) for matrix in given]
    return sum(share(matrix) * energy for share, matrix, energy in zip(shares, given, energies)) / sum(energies)


def _kept_by_mpo(
    out_modes: Sequence[int], in_modes: Sequence[int], bonds: int | Sequence[int], matrix: Tensor
) -> float:
    return _energy(decompose(matrix, out_modes, in_modes, bonds)[-1]) / _energy(matrix)


def _bound_of_mpos(out_modes: Sequence[int], in_modes: Sequence[int], bond: int, matrix: Tensor) -> float:
    """What no MPO of these bonds exceeds: the leading singular values of each unfolding, the least of all bonds.

    `decompose` is near the best there is, not the best; cut at one bond, a matrix of that rank is (Eckart and Young).
    """
    tensor, shares = _interleaved(matrix.double(), out_modes, in_modes), list[float]()
    for k in range(1, len(out_modes)):
        unfolding = tensor.reshape(prod(tensor.shape[:k]), -1)
        small = unfolding if unfolding.shape[0] <= unfolding.shape[1] else unfolding.t()
        energies = torch.linalg.eigvalsh(small @ small.t())  # ascending
        shares.append((energies[-bond:].sum() / energies.sum()).item())
    return min(shares)


def _kept_by_train(modes: Sequence[int], bonds: Sequence[int], matrix: Tensor) -> float:
    """A tensor train is an operator with rows of size 1."""
    return _kept_by_mpo([1] * len(modes), modes, bonds, matrix.reshape(1, -1))


def _kept_by(approximation: Tensor, matrix: Tensor) -> float:
    return 1 - _energy(matrix - approximation) / _energy(matrix)


def _kept_by_rank(rank: int, matrix: Tensor) -> float:
    return _energy(torch.linalg.svdvals(matrix)[:rank]) / _energy(matrix)


def _in_bases(left: Tensor, right: Tensor, kept: Share, matrix: Tensor) -> float:
    return kept(left.t() @ matrix @ right)


def _in_order(rows: Tensor, columns: Tensor, kept: Share, matrix: Tensor) -> float:
    return kept(matrix[rows][:, columns])


def _clustered(vectors: Tensor) -> Tensor:  # (size, singular vectors) to the order of the rows
    """Rows that are alike in the leading singular vectors beside each other: hierarchical clustering by Ward's rule."""
    return torch.from_numpy(leaves_list(ward(vectors[:, :_CLUSTERED_BY].numpy())))
