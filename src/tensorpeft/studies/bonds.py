"""``tensorpeft inspect``: how far a matrix product operator can hold the weights of a model, and with which bonds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from tensorpeft import DotaConfig
from tensorpeft.networks.bonds import Spectra, choose_bonds, effective_rank, energies_of, unfolding_energies
from tensorpeft.networks.mpo import decompose
from tensorpeft.plugin.base_weight import weight_of
from tensorpeft.quantization.errors import each_input
from tensorpeft.quantization.model import network_of, plan_layers
from tensorpeft.studies.inspected_model import kind_of

RANKS = (4, 8, 16, 32, 64)  # the bonds R that every weight is cut to
_ROUNDING = 1e-11  # of a share of the energy in float64
_FEWEST = 4  # weights of one shape from which on they are ranked among each other


@dataclass(frozen=True)
class Cut:
    """A weight, cut to some bonds.

    Args:
        bonds: the N − 1 inner ones; of an SVD its rank.
        size: parameters.
        error: ‖W − Ŵ‖ / ‖W‖, Frobenius.
    """

    bonds: tuple[int, ...]
    size: int
    error: float

    @property
    def kept(self) -> float:
        """The share of ‖W‖² that is kept: the cut is an orthogonal projection."""
        return 1 - self.error**2


@dataclass(frozen=True)
class WeightStudy:
    """One weight.

    Args:
        name: full name of its layer.
        out_modes, in_modes: of the N cores.
        energies: squared singular values, descending, float64: of the matrix, then of the N − 1 unfoldings.
        factor: what its squared error counts in the choice of the adaptive bonds: 1, or the mean square of its inputs.
        errors: R -> ‖W − MPO_R(W)‖ / ‖W‖.
        worst_cut: from 1: the unfolding that loses most at the uniform bond.
        uniform: cut to one largest bond.
        svd: the matrix SVD whose two factors come closest to that size.
        adaptive: cut to the bonds that `choose_bonds` gives it.
    """

    name: str
    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    energies: tuple[Tensor, ...]
    factor: float
    errors: dict[int, float]
    worst_cut: int
    uniform: Cut
    svd: Cut
    adaptive: Cut

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return prod(self.out_modes), prod(self.in_modes)

    @property
    def energy(self) -> float:
        """‖W‖²."""
        return self.energies[0].sum().item()

    @property
    def effective_ranks(self) -> list[float]:
        """Roy & Vetterli's, of the matrix and of each unfolding."""
        return [effective_rank(energies) for energies in self.energies]

    @property
    def middle_cut(self) -> int:
        """From 1: the unfolding with the largest exact bond."""
        sizes = [len(energies) for energies in self.energies[1:]]
        return 1 + sizes.index(max(sizes))

    @property
    def kind(self) -> str:
        """What it shares with the same weight of other layers."""
        return f"{kind_of(self.name)}, {self.shape[0]} x {self.shape[1]}"


@torch.no_grad()
def study_bonds(
    model: nn.Module,
    config: DotaConfig,  # with a number for r
    budget: int | None = None,
    batch: Mapping[str, Tensor] | None = None,
    on_weight: Callable[[int, int], object] = lambda done, total: None,
) -> list[WeightStudy]:
    """Every weight that `config` targets. Changes nothing in the model.

    Args:
        model: in full or half precision.
        config: the layers, the modes and the uniform bond.
        budget: of the adaptive bonds; None: the parameters of the uniform ones.
        batch: inputs to run the model on; with it a weight's error counts times the mean square of its inputs, which
            for inputs of no preferred direction is the error of the layer's output. None: all count alike.
        on_weight: called with the number of steps done, and of all.

    Raises:
        ValueError: no layer is found or a weight is not finite, or the budget is below bonds of 1.
    """
    shapes, _ = plan_layers(model, config)
    factors = dict.fromkeys(shapes, 1.0) if batch is None else mean_squares(model, list(shapes), batch)
    total = 2 * len(shapes)
    spectra = []
    for name, weight_shapes in shapes.items():
        out_modes, in_modes, _ = network_of(weight_shapes)
        try:
            unfoldings = unfolding_energies(weight_of(model.get_submodule(name)), out_modes, in_modes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        pairs = tuple(i * j for i, j in zip(out_modes, in_modes))
        spectra.append(Spectra(pairs, unfoldings, factors[name]))
        on_weight(len(spectra), total)
    uniform_size = sum(torch.Size(shape).numel() for weight_shapes in shapes.values() for shape in weight_shapes)
    adaptive = choose_bonds(spectra, uniform_size if budget is None else budget)
    studies = []
    for (name, weight_shapes), weight, bonds in zip(shapes.items(), spectra, adaptive):
        out_modes, in_modes, uniform = network_of(weight_shapes)
        matrix = weight_of(model.get_submodule(name)).double()  # of errors near 0, float32 would show its rounding
        energies = energies_of(matrix)
        cut = partial(cut_to, matrix, out_modes, in_modes)
        at_uniform = cut(uniform)
        tails = [part[bond:].sum().item() for part, bond in zip(weight.energies, uniform)]
        studies.append(
            WeightStudy(
                name,
                tuple(out_modes),
                tuple(in_modes),
                (energies, *weight.energies),
                weight.factor,
                {rank: cut(rank).error for rank in RANKS},
                1 + tails.index(max(tails)),
                at_uniform,
                svd_of_size(energies, (matrix.shape[0], matrix.shape[1]), at_uniform.size),
                cut(bonds),
            )
        )
        on_weight(len(shapes) + len(studies), total)
    return studies


def cut_to(
    matrix: Tensor,  # (out, in)
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    bonds: int | Sequence[int],
) -> Cut:
    """A weight's MPO; the error without contracting it: all cores but the last are left-orthonormal."""
    cores = decompose(matrix, out_modes, in_modes, bonds)
    energy = matrix.square().sum().item()
    lost = 1 - cores[-1].square().sum().item() / energy if energy else 0.0
    size = sum(core.numel() for core in cores)
    # A difference of numbers near 1: below that it is their rounding, and nothing has been cut off.
    return Cut(tuple(core.shape[3] for core in cores[:-1]), size, math.sqrt(lost) if lost > _ROUNDING else 0.0)


def svd_of_size(energies: Tensor, shape: tuple[int, int], size: int) -> Cut:
    """The matrix SVD whose factors, (out, rank) and (rank, in), come closest to `size` elements."""
    rank = min(max(round(size / sum(shape)), 1), len(energies))
    energy = energies.sum().item()
    return Cut((rank,), rank * sum(shape), math.sqrt(energies[rank:].sum().item() / energy) if energy else 0.0)


def mean_squares(model: nn.Module, names: Sequence[str], batch: Mapping[str, Tensor]) -> dict[str, float]:
    """E‖x‖² / in of each layer's inputs x on a batch; padding is left out where the input has the mask's shape.

    Raises:
        ValueError: a layer that the batch does not reach.
    """
    sums = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)
    mask = batch.get("attention_mask")

    def add(name: str, rows: Tensor) -> None:
        real = rows if mask is None or rows.shape[:-1] != mask.shape else rows[mask.bool()]
        sums[name] += real.double().square().sum().item()
        counts[name] += real.numel()

    with each_input(model, names, add):
        model(**batch)
    if unreached := next((name for name in names if not counts[name]), None):
        raise ValueError(f"{unreached}: the text does not reach this layer, so that it has no weight. Exclude it.")
    return {name: sums[name] / counts[name] for name in names}


def total_error(studies: Sequence[WeightStudy], cut: str, weighted: bool = False) -> float:
    """√(Σ ‖W − Ŵ‖² / Σ ‖W‖²) over the model, `cut` being "uniform", "svd" or "adaptive"; with factors if weighted."""
    shares = [study.energy * (study.factor if weighted else 1.0) for study in studies]
    lost = sum(share * getattr(study, cut).error ** 2 for share, study in zip(shares, studies))
    return math.sqrt(lost / sum(shares)) if sum(shares) else 0.0


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ over the weights of a group; None where one side is constant.

    Args:
        group: "all", or a shape.
        count: weights.
        rank_of: whose effective rank: "matrix" or "middle cut".
        with_error: R -> ρ with the truncation error at R.
        with_bond: ρ with the adaptive bond of the middle cut.
    """

    group: str
    count: int
    rank_of: str
    with_error: dict[int, float | None]
    with_bond: float | None


def correlations(studies: Sequence[WeightStudy]) -> list[Correlation]:
    """Does the effective rank tell how much is lost? Over all weights, and over those of one shape."""
    groups: dict[str, list[WeightStudy]] = {"all": list(studies)}
    for study in studies:
        groups.setdefault(f"{study.shape[0]} x {study.shape[1]}", []).append(study)
    if len(groups) == 2:
        del groups["all"]
    found = []
    for group, members in groups.items():
        if len(members) < _FEWEST:
            continue
        ranks = {
            "matrix": [study.effective_ranks[0] for study in members],
            "middle cut": [study.effective_ranks[study.middle_cut] for study in members],
        }
        for rank_of, values in ranks.items():
            errors = {rank: _spearman(values, [study.errors[rank] for study in members]) for rank in RANKS}
            bonds = _spearman(values, [study.adaptive.bonds[study.middle_cut - 1] for study in members])
            found.append(Correlation(group, len(members), rank_of, errors, bonds))
    return found


def _spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    # scipy would answer with NaN.
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)  # type: ignore[union-attr]
