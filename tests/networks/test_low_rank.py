"""The low-rank map against autograd through the plain formula, in float64, and bit for bit where nothing is added."""

import pytest
import torch
import torch.nn.functional as F

from tensorpeft.networks.cut import Cut
from tensorpeft.networks.effective import effective_linear, effective_weight
from tensorpeft.networks.low_rank import MATRIX_PRODUCT, Factors, low_rank_linear, low_rank_rows

OUT, IN = 7, 5


def tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def make_factors(rank: int, is_diagonal: bool, seed: int, dtype: torch.dtype = torch.float64) -> Factors:
    core = (rank,) if is_diagonal else (rank, rank)
    shapes = [(rank, IN), core, (OUT, rank)]
    return Factors(*(tensor(*shape, seed=seed + k, dtype=dtype) for k, shape in enumerate(shapes)))


def dense(factors: Factors) -> torch.Tensor:
    down, core, up = factors
    return up @ (torch.diag(core) if core.ndim == 1 else core) @ down


over_cores = pytest.mark.parametrize("is_diagonal", [True, False], ids=["diagonal", "matrix"])


@over_cores
@pytest.mark.parametrize("batch", [(4,), (2, 3), ()], ids=["rows", "sequences", "vector"])
@pytest.mark.parametrize("has_weight", [True, False])
def test_gradients_of_everything(is_diagonal: bool, batch: tuple[int, ...], has_weight: bool):
    x = tensor(*batch, IN, seed=0)
    weight, bias = (tensor(OUT, IN, seed=1), tensor(OUT, seed=2)) if has_weight else (None, None)
    groups = [make_factors(3, is_diagonal, seed=3), make_factors(2, not is_diagonal, seed=7)]

    def linear(x, weight, bias, *tensors):
        return low_rank_linear(x, weight, bias, [Factors(*tensors[:3]).pair(), Factors(*tensors[3:]).pair()])

    inputs = (x, weight, bias, *groups[0], *groups[1])
    expected = F.linear(x, sum(map(dense, groups)) + (0 if weight is None else weight), bias)
    torch.testing.assert_close(linear(*inputs), expected, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(linear, inputs)


@pytest.mark.parametrize("trained", range(6))
def test_only_what_is_asked_for_gets_a_gradient(trained: int):
    inputs = [tensor(4, IN, seed=0), tensor(OUT, IN, seed=1), tensor(OUT, seed=2), *make_factors(3, True, seed=3)]
    for k, item in enumerate(inputs):
        item.requires_grad_(k == trained)
    x, weight, bias, *factors = inputs
    low_rank_linear(x, weight, bias, [Factors(*factors).pair()]).square().sum().backward()
    assert [item.grad is not None for item in inputs] == [k == trained for k in range(6)]


@over_cores
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_update_changes_no_bit(is_diagonal: bool, dtype: torch.dtype):
    factors = make_factors(3, is_diagonal, seed=3, dtype=torch.float32)
    factors = factors._replace(up=torch.zeros_like(factors.up))
    x, weight, bias = (tensor(*shape, seed=k, dtype=dtype) for k, shape in enumerate([(9, IN), (OUT, IN), (OUT,)]))
    assert torch.equal(low_rank_linear(x, weight, bias, [factors.pair()]), F.linear(x, weight, bias))


def test_under_autocast_the_products_run_in_its_dtype():
    factors = make_factors(3, True, seed=3, dtype=torch.float32)
    x, weight = tensor(9, IN, seed=0, dtype=torch.float32), tensor(OUT, IN, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = low_rank_linear(x, weight, None, [factors.pair()])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), F.linear(x, weight + dense(factors)), atol=0.1, rtol=0.05)
    found.float().sum().backward()
    assert all(factor.grad.dtype == torch.float32 for factor in factors)


@over_cores
def test_each_row_has_its_adapters_update(is_diagonal: bool):
    groups = [make_factors(3, is_diagonal, seed=10 * k) for k in range(4)]
    stacked = Factors(*(torch.stack(items) for items in zip(*groups, strict=True)))
    adapters, x = torch.tensor([2, 0, 3, 2, 1]), tensor(5, 6, IN, seed=1)
    expected = torch.stack([F.linear(row, dense(groups[k])) for row, k in zip(x, adapters.tolist(), strict=True)])
    torch.testing.assert_close(low_rank_rows(x, stacked, adapters), expected, atol=1e-12, rtol=1e-12)
    flat = low_rank_rows(x[:, 0], stacked, adapters)  # as a layer without a sequence gives them
    torch.testing.assert_close(flat, expected[:, 0], atol=1e-12, rtol=1e-12)


@over_cores
def test_as_a_network_it_is_the_same_matrix_with_the_same_gradients(is_diagonal: bool):
    """What merging adds is what the forward multiplies by."""
    factors, x = make_factors(3, is_diagonal, seed=3), tensor(4, IN, seed=0)
    weight = tensor(OUT, IN, seed=1).detach()
    found = effective_weight(weight, [Cut(MATRIX_PRODUCT, factors)], torch.float64)
    torch.testing.assert_close(found, weight + dense(factors), atol=1e-12, rtol=1e-12)
    outputs = [
        effective_linear(x, weight, None, [Cut(MATRIX_PRODUCT, factors)]),
        low_rank_linear(x, weight, None, [factors.pair()]),
    ]
    grads = [torch.autograd.grad(output.square().sum(), [x, *factors]) for output in outputs]
    torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)
