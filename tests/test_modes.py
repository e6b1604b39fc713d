"""Modes, bond dimensions and parameter counts against brute force, the paper's table and the paper's counts."""

import re
import warnings
from functools import cache
from math import prod

import numpy as np
import pytest

from oracles import tt_svd
from shapes import HUGE, SHAPES, Shape
from tensorpeft.modes import bond_dimensions, count_parameters, factor_modes

PAPER_MODES = {
    768: (4, 4, 4, 4, 3),
    1024: (4, 4, 4, 4, 4),
    2304: (4, 4, 8, 6, 3),
    3072: (4, 4, 8, 6, 4),
    4096: (4, 4, 8, 8, 4),
    11008: (4, 4, 43, 4, 4),
    14336: (4, 8, 8, 8, 7),
    50400: (5, 10, 14, 12, 6),
}
NUM_MODES = range(1, 7)
SIZES = [*range(1, 201), 768, 1000, 2560, 4095, 4096, 4097, 5120, 6561, 8192, 11008, 14336, 27648, 32000, 50257, 151936]
PRIMES = [2, 127, 131, 257, 4099]
UNCUT = 10**9

LLAMA_2_7B = [(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]  # q, k, v, up, down; 32 layers
LLAMA_3_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]


@cache
def smallest_sum(size: int, num_modes: int) -> int:
    """The smallest sum of `num_modes` factors with product `size`, over all of them."""
    if num_modes == 1:
        return size
    divisors = [factor for factor in range(1, size + 1) if size % factor == 0]
    return min(factor + smallest_sum(size // factor, num_modes - 1) for factor in divisors)


@pytest.mark.parametrize("num_modes", NUM_MODES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_modes_multiply_to_the_size_and_repeat(num_modes: int):
    for size in SIZES:
        modes = factor_modes(size, num_modes)
        assert isinstance(modes, tuple)
        assert len(modes) == num_modes
        assert all(type(mode) is int and mode >= 1 for mode in modes)
        assert prod(modes) == size
        assert factor_modes(size, num_modes) == modes


@pytest.mark.parametrize("num_modes", NUM_MODES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_computed_modes_are_balanced_with_the_largest_in_the_middle(num_modes: int):
    for size in SIZES:
        if num_modes == 5 and size in PAPER_MODES:
            continue
        modes = factor_modes(size, num_modes)
        assert sum(modes) == smallest_sum(size, num_modes), (size, modes)
        assert max(modes) in modes[(num_modes - 1) // 2 : num_modes // 2 + 1], (size, modes)


@pytest.mark.parametrize(("size", "modes"), PAPER_MODES.items())
def test_five_modes_of_the_paper_s_sizes_are_the_paper_s(size: int, modes: tuple[int, ...]):
    assert factor_modes(size, 5) == modes


@pytest.mark.parametrize("num_modes", [2, 3, 5])
@pytest.mark.parametrize("size", PRIMES)
def test_a_prime_is_its_own_mode_and_warns(size: int, num_modes: int):
    with pytest.warns(UserWarning, match=str(size)):
        modes = factor_modes(size, num_modes)
    assert sorted(modes) == [1] * (num_modes - 1) + [size]


@pytest.mark.parametrize("size", [36, 1000, 4096, 5120])
def test_a_size_with_small_factors_does_not_warn(size: int):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factor_modes(size, 5)


@pytest.mark.parametrize(("size", "num_modes", "value"), [(0, 5, 0), (-12, 5, -12), (12, 0, 0), (12, -3, -3)])
def test_modes_of_nothing_are_refused_by_value(size: int, num_modes: int, value: int):
    with pytest.raises(ValueError, match=re.escape(str(value))):
        factor_modes(size, num_modes)


@pytest.mark.parametrize("cut", [1, 2, None, UNCUT], ids=["one", "two", "cut", "uncut"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_bonds_and_parameters_are_those_of_a_generic_decomposition(shape: Shape, cut: int | None):
    max_bond = cut or shape.max_bond
    weight = np.random.default_rng(0).standard_normal(shape.size)
    cores = tt_svd(weight, shape.out_modes, shape.in_modes, max_bond)
    bonds = bond_dimensions(shape.out_modes, shape.in_modes, max_bond)
    assert isinstance(bonds, tuple)
    assert bonds == (*(core.shape[0] for core in cores), 1)
    assert count_parameters(shape.out_modes, shape.in_modes, max_bond) == sum(core.size for core in cores)


@pytest.mark.parametrize(
    ("max_bond", "bonds"),
    [
        (1, (1, 1, 1, 1, 1, 1)),
        (16, (1, 16, 16, 16, 16, 1)),
        (32, (1, 16, 32, 32, 16, 1)),
        (UNCUT, (1, 16, 256, 1024, 16, 1)),
    ],
)
def test_bonds_of_the_paper_s_square_weight(max_bond: int, bonds: tuple[int, ...]):
    assert bond_dimensions(PAPER_MODES[4096], PAPER_MODES[4096], max_bond) == bonds


def test_parameters_of_single_weights():
    assert count_parameters(PAPER_MODES[4096], PAPER_MODES[4096], 16) == 37_376
    assert count_parameters(HUGE.out_modes, HUGE.in_modes, 16) == 256 + 4_096 + 88_064 + 8_192 + 256


@pytest.mark.parametrize(
    ("weights", "max_bond", "parameters"),
    [
        (LLAMA_2_7B, 8, 2_531_328),
        (LLAMA_2_7B, 16, 10_043_392),
        (LLAMA_2_7B, 32, 34_422_784),
        (LLAMA_3_8B, 8, 1_325_056),
        (LLAMA_3_8B, 16, 5_206_016),
        (LLAMA_3_8B, 32, 16_106_496),
    ],
)
def test_parameters_of_the_paper_s_models(weights: list[tuple[int, int]], max_bond: int, parameters: int):
    layer = sum(count_parameters(PAPER_MODES[out], PAPER_MODES[in_], max_bond) for out, in_ in weights)
    assert 32 * layer == parameters
