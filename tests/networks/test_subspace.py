"""The leading singular vectors of a matrix that is made from its SVD, in float64."""

import pytest
import torch

from tensorpeft.networks.subspace import leading_subspace, run_together, subspace_steps

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


def test_computations_that_run_together_share_the_solver_s_calls_and_have_their_own_bits(monkeypatch):
    sizes = [(24, 60), (24, 60), (16, 40), (24, 60), (60, 24)]
    matrices = [torch.randn(size, generator=torch.Generator().manual_seed(k)) for k, size in enumerate(sizes)]
    alone = [leading_subspace(matrix, 8) for matrix in matrices]
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram, **more: calls.append(gram.shape) or eigh(gram, **more))
    together = run_together([subspace_steps(matrix, 8) for matrix in matrices])
    assert sorted(calls) == [(4, 24, 24), (16, 16)]
    for mine, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_one_that_the_solver_fails_on_does_not_spoil_the_others(monkeypatch):
    """A batch fails as a whole; constant weights are such."""
    matrices, eigh = [torch.randn(24, 60), torch.ones(24, 60)], torch.linalg.eigh
    alone = [leading_subspace(matrix, 8) for matrix in matrices]

    def fails(gram, **more):
        if gram.ndim == 3 or gram[-1, 0] == 60:
            raise torch.linalg.LinAlgError
        return eigh(gram, **more)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    together = run_together([subspace_steps(matrix, 8) for matrix in matrices])
    assert all(torch.equal(*pair) for pair in zip(together[0], alone[0], strict=True))
    torch.testing.assert_close(together[1][0] @ together[1][1], matrices[1])
