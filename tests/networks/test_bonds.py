"""The spectra of a weight's cuts, and the bonds that are chosen from them, against numpy and brute force."""

from itertools import product
from math import log, prod

import numpy as np
import pytest
import torch

from oracles import mpo_to_matrix
from shapes import SHAPES, Shape
from tensorpeft.modes import bond_dimensions, count_parameters
from tensorpeft.networks.bonds import (
    Spectra,
    _Chain,
    choose_bonds,
    effective_rank,
    energies_of,
    unfolding_energies,
)
from tensorpeft.networks.mpo import contract, decompose

over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def weight_of(shape: Shape, seed: int = 0, decay: float = 0.0) -> np.ndarray:  # (out, in), float64
    """A Gaussian matrix whose singular values are made to fall."""
    left, values, right = np.linalg.svd(np.random.default_rng(seed).standard_normal(shape.size), full_matrices=False)
    return left * (values / np.arange(1, len(values) + 1) ** decay) @ right


def unfoldings(weight: np.ndarray, shape: Shape) -> list[np.ndarray]:
    """(i_1 j_1 … i_k j_k) x (the rest), by numpy's reshape of the interleaved tensor."""
    count = len(shape.out_modes)
    tensor = weight.reshape(*shape.out_modes, *shape.in_modes)
    tensor = tensor.transpose([axis for k in range(count) for axis in (k, count + k)])
    return [tensor.reshape(prod(tensor.shape[: 2 * k]), -1) for k in range(1, count)]


def tt_svd_with(weight: np.ndarray, shape: Shape, bonds: tuple[int, ...]) -> np.ndarray:  # (out, in)
    """Oseledets' algorithm 1 with a bond for each cut."""
    cores, bond, rest = [], 1, unfoldings(weight, shape)[0]
    for kept, i, j in zip(bonds, shape.out_modes, shape.in_modes):
        u, s, v = np.linalg.svd(rest.reshape(bond * i * j, -1), full_matrices=False)
        cores.append(u[:, :kept].reshape(bond, i, j, kept))
        rest, bond = s[:kept, None] * v[:kept], kept
    cores.append(rest.reshape(bond, shape.out_modes[-1], shape.in_modes[-1], 1))
    return mpo_to_matrix(cores)


def spectra_of(weight: np.ndarray, shape: Shape, factor: float = 1.0) -> Spectra:
    energies = unfolding_energies(torch.from_numpy(weight), shape.out_modes, shape.in_modes)
    return Spectra(tuple(i * j for i, j in zip(shape.out_modes, shape.in_modes)), energies, factor)


def random_spectra(pairs: tuple[int, ...], seed: int, factor: float = 1.0) -> Spectra:
    """Falling energies with one sum, as the unfoldings of one matrix have."""
    rng = np.random.default_rng(seed)
    exact = bond_dimensions(pairs, (1,) * len(pairs), 10**9)[1:-1]
    energies = [np.sort(rng.random(count) ** (1 + 6 * rng.random()))[::-1] for count in exact]
    return Spectra(pairs, tuple(torch.from_numpy(e / e.sum()) for e in energies), factor)


def possible_bonds(pairs: tuple[int, ...]) -> list[tuple[int, ...]]:
    exact = bond_dimensions(pairs, (1,) * len(pairs), 10**9)[1:-1]
    every = product(*(range(1, count + 1) for count in exact))
    return [b for b in every if bond_dimensions(pairs, (1,) * len(pairs), b)[1:-1] == b]


def total_kept(weights: list[Spectra], bonds: list[tuple[int, ...]]) -> float:
    return sum(weight.energy * weight.kept(b) for weight, b in zip(weights, bonds))


# --- spectra


@over_shapes
def test_energies_are_numpy_s(shape: Shape):
    weight = weight_of(shape, decay=0.5)
    found = unfolding_energies(torch.from_numpy(weight), shape.out_modes, shape.in_modes)
    assert [len(e) for e in found] == list(bond_dimensions(shape.out_modes, shape.in_modes, 10**9)[1:-1])
    if len(shape.out_modes) == 1:
        return
    for energies, unfolding in zip(found, unfoldings(weight, shape), strict=True):
        narrow = np.linalg.qr(unfolding.T if unfolding.shape[0] < unfolding.shape[1] else unfolding, mode="r")
        expected = np.linalg.svd(narrow, compute_uv=False) ** 2
        assert energies.dtype == torch.float64
        np.testing.assert_allclose(energies.numpy(), expected, rtol=1e-9, atol=1e-12 * expected.sum())


def test_a_wide_matrix_is_read_in_parts(monkeypatch):
    matrix = torch.randn(5, 103, dtype=torch.float64)
    expected = energies_of(matrix)
    monkeypatch.setattr("tensorpeft.networks.bonds._COLUMNS_AT_A_TIME", 10)
    assert torch.allclose(energies_of(matrix), expected, rtol=1e-12)
    assert torch.allclose(energies_of(matrix.t()), expected, rtol=1e-12)


def test_what_has_no_spectrum_is_refused_by_value():
    for weight, message in (
        (torch.full((6, 4), float("nan")), "finite"),
        (torch.empty(6, 4, device="meta"), "meta"),
        (torch.ones(6, 5), r"\(6, 4\) matrix, but the weight is \(6, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            unfolding_energies(weight, (2, 3), (2, 2))


def test_effective_rank_is_between_one_and_all():
    assert effective_rank(torch.tensor([9.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.zeros(7)) == 0
    p = np.array([3.0, 1.0]) / 4  # of the singular values, not of the energies
    assert effective_rank(torch.tensor([9.0, 1.0])) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


# --- a bond for each cut


BONDS_OF = [
    (SHAPES[2], (3, 2)),
    (SHAPES[2], (6, 4)),
    (SHAPES[6], (5,)),
    (SHAPES[7], (15, 4)),
    (SHAPES[7], (2, 17)),
    (Shape("four-48x36", (2, 3, 4, 2), (3, 2, 2, 3), 0), (6, 7, 3)),
    (Shape("four-48x36", (2, 3, 4, 2), (3, 2, 2, 3), 0), (2, 12, 5)),
]


@pytest.mark.parametrize(("shape", "bonds"), BONDS_OF, ids=lambda value: str(getattr(value, "name", value)))
def test_truncation_with_a_bond_for_each_cut_is_the_oracle_s(shape: Shape, bonds: tuple[int, ...]):
    weight = weight_of(shape, decay=0.5)
    expected = tt_svd_with(weight, shape, bonds)
    cores = decompose(torch.from_numpy(weight), shape.out_modes, shape.in_modes, bonds)
    assert tuple(core.shape[3] for core in cores) == (*bonds, 1)
    assert sum(core.numel() for core in cores) == count_parameters(shape.out_modes, shape.in_modes, bonds)
    np.testing.assert_allclose(contract(cores).numpy(), expected, atol=1e-9 * np.linalg.norm(weight))
    # Left-orthonormal, so that the error needs no contraction; and no more than the sum of the tails.
    error = np.linalg.norm(weight - expected) ** 2
    assert error == pytest.approx(np.linalg.norm(weight) ** 2 - cores[-1].square().sum().item(), rel=1e-9)
    energies = unfolding_energies(torch.from_numpy(weight), shape.out_modes, shape.in_modes)
    assert error <= sum(e[b:].sum().item() for e, b in zip(energies, bonds)) * (1 + 1e-9)


@over_shapes
def test_equal_bonds_are_the_uniform_bond_bit_for_bit(shape: Shape):
    weight = torch.from_numpy(weight_of(shape)).float()
    uniform = decompose(weight, shape.out_modes, shape.in_modes, shape.max_bond)
    inner = bond_dimensions(shape.out_modes, shape.in_modes, shape.max_bond)[1:-1]
    for bonds in (inner, [shape.max_bond] * len(inner)):
        found = decompose(weight, shape.out_modes, shape.in_modes, bonds)
        assert all(torch.equal(a, b) for a, b in zip(found, uniform, strict=True))


def test_bonds_are_cut_to_what_their_neighbours_can_use():
    assert bond_dimensions((4, 4, 8, 8, 4), (4, 4, 8, 8, 4), [99, 2, 9999, 99]) == (1, 16, 2, 128, 16, 1)
    assert bond_dimensions((4, 4, 4), (4, 4, 4), [16, 1]) == (1, 16, 1, 1)
    for inner in ([4], [4, 4, 4], [4, 0]):
        with pytest.raises(ValueError, match=r"3 cores, expected 2"):
            bond_dimensions((4, 4, 4), (4, 4, 4), inner)


# --- the choice


@pytest.mark.parametrize("price", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("pairs", [(4, 6, 2), (3, 4, 4, 2), (6, 6)])
def test_the_chain_is_brute_force_s_at_every_price(pairs: tuple[int, ...], price: float):
    weights = [random_spectra(pairs, seed) for seed in range(4)]
    for weight, found in zip(weights, _Chain(weights).solve(price)):

        def cost(bonds: tuple[int, ...], weight: Spectra = weight) -> float:
            return -log(weight.kept(bonds)) + price * weight.size(bonds)

        assert cost(found) == pytest.approx(min(map(cost, possible_bonds(pairs))), rel=1e-12)


@pytest.mark.parametrize("budget", [40, 60, 100, 150, 220])
def test_two_weights_come_close_to_brute_force(budget: int):
    for seed in range(8):
        weights = [random_spectra((4, 6, 2), seed, 1.0), random_spectra((3, 4, 3), seed + 100, 0.5)]
        found = choose_bonds(weights, budget)
        assert sum(w.size(b) for w, b in zip(weights, found)) <= budget
        assert all(b in possible_bonds(w.pairs) for w, b in zip(weights, found))
        tables = [[(w.size(b), w.energy * w.kept(b)) for b in possible_bonds(w.pairs)] for w in weights]
        best = max(a[1] + b[1] for a in tables[0] for b in tables[1] if a[0] + b[0] <= budget)
        assert total_kept(weights, found) >= 0.97 * best


@pytest.mark.parametrize("r", [1, 2, 5, 16])
def test_never_worse_than_uniform_bonds_of_the_same_size(r: int):
    for seed in range(6):
        weights = [random_spectra((4, 6, 8, 2), seed), random_spectra((9, 4, 3), seed + 50, 3.0)]
        weights.append(Spectra((4, 4, 4), (torch.ones(4) / 4, torch.ones(4) / 4)))  # nothing to gain anywhere
        uniform = [bond_dimensions(w.pairs, (1,) * len(w.pairs), r)[1:-1] for w in weights]
        budget = sum(w.size(b) for w, b in zip(weights, uniform))
        found = choose_bonds(weights, budget)
        assert sum(w.size(b) for w, b in zip(weights, found)) <= budget
        assert total_kept(weights, found) >= total_kept(weights, uniform) * (1 - 1e-12)
        assert choose_bonds(weights, budget) == found


def test_the_budget_goes_where_the_energy_is():
    shape = Shape("64x64", (4, 4, 4), (4, 4, 4), 0)
    flat, steep = (spectra_of(weight_of(shape, seed, decay), shape) for seed, decay in ((1, 0.0), (2, 3.0)))
    found = choose_bonds([flat, steep], budget=1500)
    assert flat.size(found[0]) > steep.size(found[1])  # one singular value is nearly all of the steep one
    heavier = Spectra(flat.pairs, flat.energies, 1e-6)  # as flat, but hardly counts
    assert heavier.size(choose_bonds([heavier, steep], budget=1500)[0]) < flat.size(found[0])


def test_large_bonds_are_thinned_and_the_rest_of_the_budget_is_used():
    pairs = (300, 300)
    weights = [random_spectra(pairs, seed) for seed in range(3)]
    found = choose_bonds(weights, budget=300_000)
    assert 0 <= 300_000 - sum(w.size(b) for w, b in zip(weights, found)) < 600


def test_more_than_everything_gives_the_exact_bonds():
    shape = Shape("12x6", (2, 3, 2), (3, 1, 2), 0)
    weight = spectra_of(weight_of(shape), shape)
    assert choose_bonds([weight], 10**9) == [(6, 4)]
    assert weight.kept(choose_bonds([weight], 10**9)[0]) == pytest.approx(1)


def test_weights_of_zero_get_bonds_of_one():
    zero = Spectra((4, 4, 4), (torch.zeros(4).double(), torch.zeros(4).double()))
    assert choose_bonds([zero], 1000) == [(1, 1)]


def test_a_budget_below_bonds_of_one_is_refused_by_value():
    with pytest.raises(ValueError, match=r"budget=23: expected at least 24, the parameters of these 2 weights"):
        choose_bonds([random_spectra((4, 6, 2), 0)] * 2, 23)
    assert choose_bonds([random_spectra((4, 6, 2), 0)] * 2, 24) == [(1, 1)] * 2
