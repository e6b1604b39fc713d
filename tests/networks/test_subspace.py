"""The leading singular vectors of a matrix that is made from its SVD, in float64."""

import pytest
import torch

from tensorpeft.networks.subspace import leading_subspace

# Around the width from which the projection is a batch of products; tall, square and wide.
SHAPES = [(48, 1016), (48, 1024), (48, 1030), (48, 4096), (1100, 1032), (1100, 48), (60, 60)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_that_of_the_svd(shape: tuple[int, int], dtype: torch.dtype):
    torch.manual_seed(0)
    decay = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), dtype=torch.float64)).Q
    rows, expected = (left * decay) @ right.t(), left[:, :16] @ left[:, :16].t()
    basis, rest = leading_subspace(rows.to(dtype), 16)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(basis.double() @ basis.double().t(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(rest.double(), basis.double().t() @ rows, atol=tolerance / 10, rtol=0)
