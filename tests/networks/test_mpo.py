"""Decomposition and contraction of matrix product operators against numpy oracles and tensorly."""

from functools import reduce
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from tensorly.decomposition import tensor_train_matrix
from torch import Tensor

from oracles import mpo_entry, mpo_to_matrix, multi_index, tt_svd
from shapes import HUGE, SHAPES, Shape
from tensorpeft.networks.mpo import balance, contract, decompose

TOLERANCES = {
    # exact: Frobenius distance between what should be equal, over the weight's norm
    # constant: the same for a weight of ones, where rounding errors all have one sign and add up
    # truncated: the same for truncations, whose subspaces feel rounding through the gap at the cut
    # error: relative difference between two truncation errors
    # gauge: largest entry of QᵀQ − 1
    # projection: difference between two inner products, over the weight's norm squared
    torch.float32: {
        "exact": 1e-5,
        "constant": 1e-3,
        "truncated": 1e-3,
        "error": 1e-4,
        "gauge": 5e-5,
        "projection": 1e-5,
    },
    torch.float64: {
        "exact": 1e-12,
        "constant": 1e-11,
        "truncated": 1e-9,
        "error": 1e-9,
        "gauge": 1e-12,
        "projection": 1e-12,
    },
}
UNCUT = 10**9
TINY = Shape("tiny-12x6", (2, 3, 2), (3, 1, 2), 2)

over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
over_dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def gaussian(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(shape.size)


def decaying_spectrum(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    out_size, in_size = shape.size
    singular_values = 1.0 / np.arange(1, min(out_size, in_size, 128) + 1)
    left = rng.standard_normal((out_size, len(singular_values)))
    return (left * singular_values) @ rng.standard_normal((len(singular_values), in_size))


def kronecker_product(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    factors = zip(shape.out_modes, shape.in_modes, strict=True)
    return reduce(np.kron, [rng.standard_normal(factor) for factor in factors])


def kronecker_sum(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Decays across every cut between cores, where `decaying_spectrum` does so only between rows and columns."""
    return sum(kronecker_product(shape, rng) / (1 + term) ** 2 for term in range(24))


def rank_two(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((shape.size[0], 2)) @ rng.standard_normal((2, shape.size[1]))


def zeros(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    return np.zeros(shape.size)


GENERIC = [gaussian, decaying_spectrum, kronecker_sum]
MATRICES = [*GENERIC, kronecker_product, rank_two, zeros]
over_matrices = pytest.mark.parametrize("matrix", MATRICES, ids=lambda matrix: matrix.__name__)


def random_weight(shape: Shape, matrix=gaussian, dtype: torch.dtype = torch.float32) -> Tensor:  # (out, in)
    return torch.from_numpy(matrix(shape, np.random.default_rng(0))).to(dtype)


def random_cores(shape: Shape, bond: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    bonds = pairwise([1, *[bond] * (len(shape.out_modes) - 1), 1])
    sizes = [(a, i, j, b) for (a, b), i, j in zip(bonds, shape.out_modes, shape.in_modes, strict=True)]
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def relative_error(approximation: np.ndarray, weight: np.ndarray) -> float:
    """The Frobenius error over the weight's norm; of a zero weight, the error itself."""
    return np.linalg.norm(approximation - weight) / (np.linalg.norm(weight) or 1.0)


class Truncation:
    """One weight and its truncated cores, as float64 arrays."""

    def __init__(self, shape: Shape, matrix, dtype: torch.dtype):
        weight = random_weight(shape, matrix, dtype)
        cores = decompose(weight, shape.out_modes, shape.in_modes, shape.max_bond)
        self.shape, self.tolerance = shape, TOLERANCES[dtype]
        self.weight, self.cores = to_numpy(weight), [to_numpy(core) for core in cores]
        self.matrix = mpo_to_matrix(self.cores)


# One truncation is shared by all its properties; the module's scope lets go of it before the next one is made.
@pytest.fixture(
    scope="module",
    params=[
        *product(SHAPES, MATRICES, TOLERANCES),
        *(
            pytest.param((HUGE, matrix, torch.float32), marks=pytest.mark.thorough)
            for matrix in (gaussian, decaying_spectrum)
        ),
    ],
    ids=lambda case: f"{case[0].name}-{case[1].__name__}-{case[2]}",
)
def truncation(request: pytest.FixtureRequest) -> Truncation:
    return Truncation(*request.param)


# --- decompose, truncated


def test_truncation_and_its_error_are_the_oracle_s(truncation: Truncation):
    oracle = tt_svd(truncation.weight, *truncation.shape[1:])
    assert [core.shape for core in truncation.cores] == [core.shape for core in oracle]
    expected = mpo_to_matrix(oracle)
    distance = np.linalg.norm(truncation.matrix - expected)
    assert distance <= truncation.tolerance["truncated"] * np.linalg.norm(truncation.weight)
    assert relative_error(truncation.matrix, truncation.weight) == pytest.approx(
        relative_error(expected, truncation.weight),
        rel=truncation.tolerance["error"],
        abs=truncation.tolerance["exact"],
    )


def test_all_cores_but_the_last_are_left_orthonormal(truncation: Truncation):
    for core in truncation.cores[:-1]:
        frame = core.reshape(-1, core.shape[-1])
        assert np.abs(frame.T @ frame - np.eye(core.shape[-1])).max() < truncation.tolerance["gauge"]


def test_truncation_is_an_orthogonal_projection(truncation: Truncation):
    overlap, norm = np.vdot(truncation.weight, truncation.matrix), np.vdot(truncation.matrix, truncation.matrix)
    assert abs(overlap - norm) <= truncation.tolerance["projection"] * np.vdot(truncation.weight, truncation.weight)


@over_shapes
@pytest.mark.parametrize("matrix", GENERIC, ids=lambda matrix: matrix.__name__)
def test_truncation_error_is_tensorly_s(shape: Shape, matrix):
    weight = random_weight(shape, matrix)
    truncated = contract(decompose(weight, shape.out_modes, shape.in_modes, shape.max_bond))
    tensor = to_numpy(weight).reshape(*shape.out_modes, *shape.in_modes)
    expected = tensor_train_matrix(tensor, shape.max_bond).to_matrix()
    assert relative_error(to_numpy(truncated), to_numpy(weight)) == pytest.approx(
        relative_error(expected.reshape(shape.size), to_numpy(weight)),
        rel=TOLERANCES[torch.float32]["error"],
        abs=TOLERANCES[torch.float32]["exact"],
    )


# --- decompose, exact


@over_shapes
@over_matrices
@over_dtypes
def test_full_bond_gives_the_weight_back(shape: Shape, matrix, dtype: torch.dtype):
    weight = random_weight(shape, matrix, dtype)
    cores = decompose(weight, shape.out_modes, shape.in_modes, UNCUT)
    assert relative_error(to_numpy(contract(cores)), to_numpy(weight)) <= TOLERANCES[dtype]["exact"]
    assert {core.dtype for core in cores} == {dtype}


@over_shapes
def test_zero_weight_gives_finite_cores_and_exactly_zero(shape: Shape):
    cores = decompose(torch.zeros(shape.size), shape.out_modes, shape.in_modes, shape.max_bond)
    assert all(core.isfinite().all() for core in cores)
    assert not contract(cores).any()


@over_shapes
@over_dtypes
def test_constant_weight_survives_its_repeated_singular_values(shape: Shape, dtype: torch.dtype):
    cores = decompose(torch.ones(shape.size, dtype=dtype), shape.out_modes, shape.in_modes, UNCUT)
    assert relative_error(to_numpy(contract(cores)), np.ones(shape.size)) <= TOLERANCES[dtype]["constant"]


@over_shapes
@over_dtypes
def test_kronecker_product_needs_bond_one(shape: Shape, dtype: torch.dtype):
    weight = random_weight(shape, kronecker_product, dtype)
    cores = decompose(weight, shape.out_modes, shape.in_modes, 1)
    assert relative_error(to_numpy(contract(cores)), to_numpy(weight)) <= TOLERANCES[dtype]["exact"]


@over_shapes
@over_dtypes
def test_operator_of_small_bond_is_recovered(shape: Shape, dtype: torch.dtype):
    weight = torch.from_numpy(mpo_to_matrix([to_numpy(core) for core in random_cores(shape, 3, dtype)])).to(dtype)
    cores = decompose(weight, shape.out_modes, shape.in_modes, 3)
    assert relative_error(to_numpy(contract(cores)), to_numpy(weight)) <= TOLERANCES[dtype]["exact"]


# --- decompose, how it behaves


@over_shapes
def test_decomposition_repeats_bit_by_bit(shape: Shape):
    weight = random_weight(shape)
    first, second = (decompose(weight, shape.out_modes, shape.in_modes, shape.max_bond) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@over_shapes
def test_parameter_is_left_alone_and_its_cores_are_detached(shape: Shape):
    weight = torch.nn.Parameter(random_weight(shape))
    before = weight.detach().clone()
    cores = decompose(weight, shape.out_modes, shape.in_modes, shape.max_bond)
    assert torch.equal(weight, before)
    assert not any(core.requires_grad for core in cores)


@over_shapes
def test_strides_do_not_matter(shape: Shape):
    weight = random_weight(shape)
    strided = weight.T.contiguous().T
    cores = decompose(strided, shape.out_modes, shape.in_modes, UNCUT)
    assert relative_error(to_numpy(contract(cores)), to_numpy(weight)) <= TOLERANCES[torch.float32]["exact"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype):
    weight = random_weight(TINY, dtype=dtype)
    cores = decompose(weight, TINY.out_modes, TINY.in_modes, TINY.max_bond)
    in_float32 = decompose(weight.float(), TINY.out_modes, TINY.in_modes, TINY.max_bond)
    assert all(torch.equal(core, expected) for core, expected in zip(cores, in_float32, strict=True))
    assert all(core.dtype == torch.float32 for core in cores)


@pytest.mark.parametrize(
    ("size", "out_modes", "in_modes", "max_bond", "message"),
    [
        ((35, 22), (5, 11), (2, 11), 4, r"(?s)(?=.*35)(?=.*(55|5, 11))"),
        ((35, 22), (5, 7), (2, 13), 4, r"(?s)(?=.*22)(?=.*(26|2, 13))"),
        ((22, 35), (5, 7), (2, 11), 4, "22|35"),
        ((35, 22), (5, 7, 1), (2, 11), 4, r"(?s)3.*2|2.*3|5, 7, 1"),
        ((35, 22), (5, 7), (2, 11), 0, "0"),
        ((35, 22), (5, 7), (2, 11), -4, "-4"),
        ((770,), (5, 7), (2, 11), 4, "770|1"),
        ((5, 7, 22), (5, 7), (2, 11), 4, "5, 7, 22|3"),
    ],
)
def test_misfitting_arguments_are_refused_by_value(size, out_modes, in_modes, max_bond, message):
    with pytest.raises(ValueError, match=message):
        decompose(torch.ones(size), out_modes, in_modes, max_bond)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@over_dtypes
def test_weight_that_is_not_finite_is_refused(value: float, dtype: torch.dtype):
    weight = random_weight(TINY, dtype=dtype)
    weight[3, 4] = value
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        decompose(weight, TINY.out_modes, TINY.in_modes, TINY.max_bond)


# --- contract


def test_multi_index_is_row_major():
    assert [multi_index(flat, (2, 3, 4)) for flat in range(24)] == list(product(range(2), range(3), range(4)))


def test_every_element_is_a_product_of_matrices():
    cores = random_cores(TINY, 3, torch.float64)
    arrays = [to_numpy(core) for core in cores]
    expected = [[mpo_entry(arrays, row, column) for column in range(6)] for row in range(12)]
    np.testing.assert_allclose(mpo_to_matrix(arrays), expected, rtol=0, atol=TOLERANCES[torch.float64]["exact"])
    np.testing.assert_allclose(to_numpy(contract(cores)), expected, rtol=0, atol=TOLERANCES[torch.float64]["exact"])


@over_shapes
@over_dtypes
def test_contraction_is_the_oracle_s(shape: Shape, dtype: torch.dtype):
    cores = random_cores(shape, 3, dtype)
    matrix = contract(cores)
    assert matrix.shape == shape.size
    assert matrix.dtype == dtype
    expected = mpo_to_matrix([to_numpy(core) for core in cores])
    assert relative_error(to_numpy(matrix), expected) <= TOLERANCES[dtype]["exact"]


def test_gradient_of_each_core_is_the_oracle_s():
    cores = [core.requires_grad_() for core in random_cores(TINY, 3, torch.float64)]
    arrays = [to_numpy(core) for core in cores]
    cotangent = np.random.default_rng(1).standard_normal(TINY.size)
    gradients = torch.autograd.grad(contract(cores), cores, torch.from_numpy(cotangent))
    for k, gradient in enumerate(gradients):
        # The matrix is linear in each core, so a unit core in its place gives the derivative without a step size.
        units = np.eye(arrays[k].size).reshape(-1, *arrays[k].shape)
        expected = [np.vdot(cotangent, mpo_to_matrix([*arrays[:k], unit, *arrays[k + 1 :]])) for unit in units]
        np.testing.assert_allclose(to_numpy(gradient).ravel(), expected, atol=TOLERANCES[torch.float64]["exact"])


def test_bonds_that_do_not_meet_are_refused_by_value():
    with pytest.raises(ValueError, match=r"(?s)5.*7|7.*5"):
        contract([torch.ones(1, 2, 2, 5), torch.ones(7, 2, 2, 1)])


def test_balanced_cores_have_one_root_mean_square_and_are_the_same_operator():
    cores = decompose(torch.randn(24, 24, generator=torch.Generator().manual_seed(0)), (2, 3, 4), (3, 2, 4), 5)
    found = balance(cores)
    sizes = torch.stack([core.square().mean().sqrt() for core in found])
    torch.testing.assert_close(sizes, sizes.mean().expand(3))
    torch.testing.assert_close(contract(found), contract(cores))
    before = torch.stack([core.square().mean().sqrt() for core in cores])
    assert before.max() > 2 * before.min()


def test_an_operator_that_is_zero_stays_as_it_is_when_balanced():
    cores = [torch.ones(1, 2, 2, 3), torch.zeros(3, 2, 2, 1)]
    assert all(torch.equal(found, core) for found, core in zip(balance(cores), cores, strict=True))
