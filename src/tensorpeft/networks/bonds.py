"""Adaptive bonds: how many singular vectors each cut of each weight keeps, under one budget of parameters.

Unfolding k of a weight has the rows (i_1 j_1 … i_k j_k) and the columns (i_{k+1} j_{k+1} … i_N j_N). Cut to the bond
r_k it keeps the share q_k(r_k) = Σ_{s ≤ r_k} σ_{k,s}² / ‖W‖² of its energy (squared singular values). A network cut at
all bonds is taken to keep the product of the shares: ‖W − MPO(T)‖² ≈ ‖W‖² (1 − Π_k q_k(r_k)).

To first order in what is lost this is TT-SVD's bound, Σ_k (1 − q_k) (Oseledets 2011, theorem 2.2). Trained weights lose
most of their energy, where that bound is larger than the energy itself and bonds chosen by it are worse than uniform
ones; the product is within a few percent of the error (docs/inspect.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from math import exp, expm1, prod
from typing import Any, cast

import torch
from torch import Tensor

from tensorpeft.modes import bond_dimensions

_linalg: Any = torch.linalg  # has no types
_special: Any = torch.special  # nor has this

# Columns of a wide matrix that are made float64 at a time: 4096 rows of them are half a gigabyte.
_COLUMNS_AT_A_TIME = 2**14
# Bonds are tried one by one up to the first, above it in steps of the second: the spectra are flat there.
_EVERY_BOND_UP_TO, _STEP = 64, 1.04
# Prices of a parameter at which a weight's bonds are computed, from the one that leaves every bond at 1 downwards.
_NUM_PRICES, _LOWEST_PRICE = 128, 1e-12

Bonds = tuple[int, ...]  # the N − 1 inner bonds of one weight


@dataclass(frozen=True)
class Spectra:
    """What a weight keeps at each cut.

    Args:
        pairs: n_k = i_k j_k of the N cores.
        energies: of the N − 1 unfoldings, each (exact bond,), float64, descending: `unfolding_energies`.
        factor: what the weight's squared error counts, such as the mean energy of its inputs.
    """

    pairs: tuple[int, ...]
    energies: tuple[Tensor, ...]
    factor: float = 1.0

    @cached_property
    def energy(self) -> float:
        """‖W‖² times the factor."""
        return self.factor * (self.energies[0].sum().item() if self.energies else 0.0)

    @cached_property
    def losses(self) -> list[Tensor]:
        """−ln q_k(r) of every cut, each (exact bond,), for r from 1; zeros of a zero weight."""
        # Summed from the smallest: the tails of large bonds are differences of large numbers otherwise.
        tails = [energies.flip(0).cumsum(0).flip(0) for energies in self.energies]
        shares = [torch.cat([tail[1:], tail.new_zeros(1)]) / tail[0].clamp_min(1e-300) for tail in tails]
        return [-torch.log1p(-share) for share in shares]

    def kept(self, bonds: Sequence[int]) -> float:
        """Π_k q_k(r_k): the share of the energy that a network with these inner bonds is taken to keep."""
        return exp(-sum(losses[bond - 1].item() for losses, bond in zip(self.losses, bonds)))

    def size(self, bonds: Sequence[int]) -> int:
        """Σ_k r_{k−1} n_k r_k: its number of parameters."""
        outer = (1, *bonds, 1)
        return sum(outer[k] * pair * outer[k + 1] for k, pair in enumerate(self.pairs))


@torch.no_grad()
def energies_of(
    matrix: Tensor,  # (m, n), floating point
) -> Tensor:  # (min(m, n),), float64, on the CPU
    """The squared singular values, descending, from the Gram matrix of the narrow side in float64.

    That side has at most √(m n) rows. Energies below 1e-16 of the largest are noise, those below zero are set to it.
    """
    narrow = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    gram = torch.zeros(len(narrow), len(narrow), dtype=torch.float64, device=matrix.device)
    for first in range(0, narrow.shape[1], _COLUMNS_AT_A_TIME):
        part = narrow[:, first : first + _COLUMNS_AT_A_TIME].double()
        gram.addmm_(part, part.t())
    return _linalg.eigvalsh(gram).flip(0).clamp_min(0).cpu()


@torch.no_grad()
def unfolding_energies(
    weight: Tensor,  # (out, in), floating point
    out_modes: Sequence[int],
    in_modes: Sequence[int],
) -> tuple[Tensor, ...]:  # N − 1, each (exact bond,), float64, on the CPU
    """The energies (squared singular values), descending, of the unfoldings of an MPO; the exact bond is how many.

    Raises:
        ValueError: the weight is not a finite matrix on a real device, or the modes' products are not its shape.

    Source: Oseledets (2011), section 2.

    >>> [len(energies) for energies in unfolding_energies(torch.randn(24, 24), (3, 4, 2), (3, 4, 2))]
    [9, 4]
    """
    if weight.ndim != 2 or weight.is_meta or not torch.isfinite(weight).all():
        raise ValueError(
            f"cannot take the spectra of a tensor of shape {tuple(weight.shape)}, {weight.dtype}, on {weight.device}: "
            "expected a finite matrix (out, in) on a real device. Load the model first, and check its checkpoint."
        )
    if (prod(out_modes), prod(in_modes)) != tuple(weight.shape):
        raise ValueError(
            f"the modes {tuple(out_modes)} x {tuple(in_modes)} make a ({prod(out_modes)}, {prod(in_modes)}) matrix, "
            f"but the weight is {tuple(weight.shape)}: the modes of a side must multiply to its size."
        )
    found: list[Tensor] = []
    for k in range(1, len(out_modes)):
        grouped = weight.reshape(prod(out_modes[:k]), prod(out_modes[k:]), prod(in_modes[:k]), prod(in_modes[k:]))
        found.append(energies_of(grouped.transpose(1, 2).reshape(grouped.shape[0] * grouped.shape[2], -1)))
    return tuple(found)


def effective_rank(
    energies: Tensor,  # (n,), squared singular values
) -> float:
    """The number of singular values that count, exp(−Σ p ln p) with p_i = σ_i / Σ σ; 0 of a zero matrix.

    Between 1 (one singular value) and n (n equal ones). Source: Roy & Vetterli (2007), "The effective rank".

    >>> round(effective_rank(torch.tensor([4.0, 4.0, 4.0])), 6)
    3.0
    """
    values = energies.double().sqrt()
    if not values.any():
        return 0.0
    return _special.entr(values / values.sum()).sum().exp().item()


def choose_bonds(
    weights: Sequence[Spectra],
    budget: int,
) -> list[Bonds]:  # of each weight
    """The bonds that lose least over all weights, with no more than `budget` parameters in all. Deterministic.

    Minimises Σ_weights factor · ‖W‖² (1 − Π_k q_k(r_k)) subject to Σ_weights Σ_k r_{k−1} n_k r_k ≤ budget, over bonds
    that a network can have (r_k ≤ r_{k−1} n_k and r_k ≤ n_{k+1} r_{k+1}).

    Within one weight, at a fixed price of a parameter, −Σ_k ln q_k is a chain in which only neighbouring bonds meet:
    dynamic programming over r_1 … r_{N−1} solves it, and a range of prices gives the weight's frontier. Across weights
    each takes the point of its frontier that is best at one price λ; bisection on λ meets the budget. What that leaves
    goes to the steps that gain most per parameter. The answer is never worse than the largest uniform bond that fits.

    Raises:
        ValueError: the budget does not suffice for bonds of 1 everywhere.

    >>> flat, steep = torch.ones(4), torch.tensor([3.9, 0.1, 0.0, 0.0])
    >>> choose_bonds([Spectra((4, 4), (flat,)), Spectra((4, 4), (steep,))], budget=32)
    [(3,), (1,)]
    """
    smallest = sum(sum(weight.pairs) for weight in weights)
    if budget < smallest:
        raise ValueError(
            f"budget={budget:,}: expected at least {smallest:,}, the parameters of these {len(weights)} weights with "
            "every bond 1. Raise the budget, or adapt fewer layers."
        )
    frontiers = _frontiers(weights)
    priced = _climb(frontiers, _at_one_price(frontiers, budget), budget)
    starts = [[frontier.bonds[point] for frontier, point in zip(frontiers, priced)], _uniform(weights, budget)]
    filled = [_fill(weights, bonds, budget) for bonds in starts]
    return max(filled, key=lambda bonds: sum(weight.energy * weight.kept(b) for weight, b in zip(weights, bonds)))


@dataclass(frozen=True)
class _Frontier:
    """The bonds of one weight that keep most for their size, by size, from 1 everywhere."""

    bonds: list[Bonds]
    sizes: Tensor  # (points,), float64
    kept: Tensor  # (points,), float64: energies, times the factor


def _frontiers(weights: Sequence[Spectra]) -> list[_Frontier]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, weight in enumerate(weights):
        groups.setdefault(weight.pairs, []).append(index)
    found: list[set[Bonds]] = [{(1,) * len(weight.energies)} for weight in weights]
    for indices in groups.values():
        chain = _Chain([weights[index] for index in indices])
        # A bond above 1 costs a parameter at least, and gains no more than all that is lost at 1.
        highest = max(sum(losses[0].item() for losses in weights[index].losses) for index in indices)
        for step in range(_NUM_PRICES if highest > 0 else 0):
            price = highest * _LOWEST_PRICE ** (step / (_NUM_PRICES - 1))
            for index, bonds in zip(indices, chain.solve(price)):
                found[index].add(bonds)
    frontiers: list[_Frontier] = []
    for weight, several in zip(weights, found):
        bonds = sorted(several, key=lambda b: (weight.size(b), b))
        sizes = torch.tensor([weight.size(b) for b in bonds], dtype=torch.float64)
        kept = torch.tensor([weight.energy * weight.kept(b) for b in bonds], dtype=torch.float64)
        frontiers.append(_Frontier(bonds, sizes, kept))
    return frontiers


class _Chain:
    """The weights of one tuple of pairs; solved together for every price.

    Args:
        weights: all with the same pairs.
    """

    def __init__(self, weights: Sequence[Spectra]):
        pairs = weights[0].pairs
        one = torch.ones(1, dtype=torch.int64)
        inner = [_candidates(len(energies)) for energies in weights[0].energies]
        self.bonds = [one, *inner, one]
        # (weights, candidates) of each cut; the end of the chain loses nothing
        losses = [torch.stack([weight.losses[k] for weight in weights])[:, tried - 1] for k, tried in enumerate(inner)]
        self.losses = [*losses, torch.zeros(len(weights), 1, dtype=torch.float64)]
        # (candidates on the left, on the right) of each core
        cores = [(left[:, None], pair, right) for left, pair, right in zip(self.bonds, pairs, self.bonds[1:])]
        self.sizes = [(left * pair * right).double() for left, pair, right in cores]
        self.impossible = [(right > left * pair) | (left > right * pair) for left, pair, right in cores]

    def solve(self, price: float) -> list[Bonds]:
        """The bonds of each weight that minimise Σ_k −ln q_k(r_k) + price · size."""
        cost = torch.zeros_like(self.losses[-1])  # (weights, candidates): the best of the chain so far
        origins: list[Tensor] = []
        for sizes, impossible, losses in zip(self.sizes, self.impossible, self.losses):
            edges = (price * sizes).masked_fill(impossible, float("inf"))
            cost, origin = (cost[:, :, None] + edges).min(1)
            cost = cost + losses
            origins.append(origin)
        position = torch.zeros(len(cost), 1, dtype=torch.int64)
        found: list[list[int]] = []
        for bonds, origin in zip(self.bonds[-2:0:-1], origins[:0:-1]):
            position = origin.gather(1, position)
            found.append(_listed(bonds[position[:, 0]]))
        return list(zip(*reversed(found))) if found else [()] * len(cost)


def _listed(tensor: Tensor) -> list[Any]:
    return cast(list[Any], tensor.tolist())  # pyright: ignore[reportUnknownMemberType]  # torch's own has no type


def _candidates(exact: int) -> Tensor:  # ascending, int64
    """The bonds to try: each of the small ones, then in steps, and the exact one."""
    tried, bond = list(range(1, min(exact, _EVERY_BOND_UP_TO) + 1)), float(_EVERY_BOND_UP_TO)
    while tried[-1] < exact:
        bond *= _STEP
        tried.append(min(max(round(bond), tried[-1] + 1), exact))
    return torch.tensor(tried)


def _at_one_price(frontiers: Sequence[_Frontier], budget: int) -> list[int]:
    """The point of each frontier that is best at the lowest price of a parameter which keeps all within the budget."""

    def points_at(price: float) -> list[int]:
        return [int((frontier.kept - price * frontier.sizes).argmax()) for frontier in frontiers]

    best = [0] * len(frontiers)
    high = sum(frontier.kept[-1].item() for frontier in frontiers)  # one parameter costs all that there is to gain
    low = high * 1e-18
    for _ in range(64 if high > 0 else 0):
        price = (low * high) ** 0.5
        found = points_at(price)
        if sum(int(frontier.sizes[point]) for frontier, point in zip(frontiers, found)) > budget:
            low = price
        else:
            high, best = price, found
    return best


def _climb(frontiers: Sequence[_Frontier], points: Sequence[int], budget: int) -> list[int]:
    """The points, moved up their frontiers where that gains most per parameter, while the budget lasts.

    What a weight keeps is no concave function of its size, so that a single price can leave much of a budget.
    """
    points = list(points)
    left = budget - sum(int(frontier.sizes[point]) for frontier, point in zip(frontiers, points))
    while True:
        best = (0.0, 0, 0)
        for index, (frontier, point) in enumerate(zip(frontiers, points)):
            costs = frontier.sizes[point + 1 :] - frontier.sizes[point]
            gains = (frontier.kept[point + 1 :] - frontier.kept[point])[costs <= left] / costs[costs <= left]
            if len(gains) and gains.max() > best[0]:
                best = (gains.max().item(), index, point + 1 + int(gains.argmax()))
        gain, index, point = best
        if gain == 0:
            return points
        left -= int(frontiers[index].sizes[point] - frontiers[index].sizes[points[index]])
        points[index] = point


def _uniform(weights: Sequence[Spectra], budget: int) -> list[Bonds]:
    """The bonds of the largest r that fits everywhere."""

    def bonds_at(r: int) -> list[Bonds]:
        return [bond_dimensions(weight.pairs, (1,) * len(weight.pairs), r)[1:-1] for weight in weights]

    low, high = 1, 1 + max((len(energies) for weight in weights for energies in weight.energies), default=1)
    while high - low > 1:
        middle = (low + high) // 2
        fits = sum(weight.size(bonds) for weight, bonds in zip(weights, bonds_at(middle))) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return bonds_at(low)


def _fill(weights: Sequence[Spectra], start: Sequence[Bonds], budget: int) -> list[Bonds]:
    """The bonds, raised one by one where that gains most per parameter, until nothing more fits or gains."""
    bonds = [list(found) for found in start]
    left = budget - sum(weight.size(found) for weight, found in zip(weights, start))
    losses: list[list[list[float]]] = [[_listed(cut) for cut in weight.losses] for weight in weights]

    def offers(index: int) -> Iterator[tuple[float, int, int, int]]:
        """(−gain per parameter, weight, cut, parameters) of each bond of a weight that can be raised."""
        outer, pairs = (1, *bonds[index], 1), weights[index].pairs
        kept = weights[index].energy * exp(-sum(cut[bond - 1] for cut, bond in zip(losses[index], bonds[index])))
        for k, (cut, bond) in enumerate(zip(losses[index], bonds[index])):
            if bond < min(len(cut), outer[k] * pairs[k], pairs[k + 1] * outer[k + 2]):
                cost = outer[k] * pairs[k] + pairs[k + 1] * outer[k + 2]
                gain = kept * expm1(cut[bond - 1] - cut[bond])
                if gain > 0:
                    yield -gain / cost, index, k, cost

    heap = [offer for index in range(len(weights)) for offer in offers(index)]
    heapify(heap)
    while heap:
        offer = heappop(heap)
        _, index, cut, cost = offer
        # Each raise changes all offers of its weight, which are then made anew: an old one is no longer among them.
        if cost > left or offer not in offers(index):
            continue
        bonds[index][cut] += 1
        left -= cost
        for offer in offers(index):
            heappush(heap, offer)
    return [tuple(found) for found in bonds]
