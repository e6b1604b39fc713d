"""A matrix cut to a rank or to a share of its energy, against its singular values in float64."""

import pytest
import torch

from tensorpeft.export.truncation import of_energy, of_rank


def matrix(rows, columns, decay):
    """Singular values k^-decay."""
    generator = torch.Generator().manual_seed(0)
    size = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))
    return ((left * torch.arange(1, size + 1) ** -decay) @ right.T).float()


over_matrices = pytest.mark.parametrize(
    ("rows", "columns", "decay"), [(40, 30, 1.0), (700, 500, 1.0), (500, 700, 0.3), (700, 500, 0.0)]
)


@over_matrices
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_the_best_approximation_of_a_rank(rows, columns, decay, rank):
    weight = matrix(rows, columns, decay)
    before = torch.get_rng_state()
    down, up = of_rank(weight, rank)
    assert (down.shape, up.shape) == ((rank, columns), (rows, rank))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, of_rank(weight, rank), (down, up)))
    values = torch.linalg.svdvals(weight.double())
    error = (weight.double() - up.double() @ down.double()).norm()
    assert values[rank:].norm() * (1 - 1e-6) <= error <= values[rank:].norm() * 1.001


def test_no_more_than_the_matrix_has():
    weight = matrix(40, 30, 1.0)
    down, up = of_rank(weight, 512)
    assert len(down) == 30
    torch.testing.assert_close(up @ down, weight, atol=1e-6, rtol=1e-5)


@over_matrices
@pytest.mark.parametrize("energy", [0.1, 0.6, 1.0])
def test_the_least_rank_that_keeps_an_energy(rows, columns, decay, energy):
    weight = matrix(rows, columns, decay)
    kept = torch.linalg.svdvals(weight.double()).square().cumsum(0)
    needed = int((kept < energy * kept[-1] * (1 - 1e-6)).sum()) + 1
    down, up = of_energy(weight, energy, max_rank=rows)
    # A randomised basis may need a little more.
    assert needed <= len(down) <= needed + 1 + needed // 50
    assert (up @ down).norm().square() >= energy * weight.norm().square() * (1 - 1e-5)


def test_an_energy_that_needs_too_many():
    assert of_energy(matrix(700, 500, 0.0), 0.9, max_rank=64) is None


def test_nothing():
    for factors in (of_rank(torch.zeros(6, 5), 2), of_energy(torch.zeros(6, 5), 0.9, 4)):
        assert torch.equal(factors.up @ factors.down, torch.zeros(6, 5))
