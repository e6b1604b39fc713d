"""An update of high rank as two thin factors: of a given rank, or of the least that keeps a share of its energy."""

from __future__ import annotations

import torch
from torch import Tensor

from tensorpeft.networks.low_rank import Pair

# A random basis with some columns more than are kept, turned towards the largest values a few times, is within a
# thousandth of the best one (tests/export/test_truncation.py), at 4096 x 4096 in a hundredth of the time.
_MORE_COLUMNS, _TURNS = 16, 4
_FIRST_RANK = 16


def of_rank(
    matrix: Tensor,  # (out, in), float32 or float64
    rank: int,  # no more than the smaller side counts
) -> Pair:
    """The best approximation of that rank; of a large matrix by a randomised SVD, the same in every call."""
    left, values, right = _leading(matrix, min(rank, *matrix.shape))
    return Pair(values.sqrt()[:, None] * right, left * values.sqrt())


def of_energy(
    matrix: Tensor,  # (out, in), float32 or float64
    energy: float,  # in (0, 1]: share of the squared Frobenius norm
    max_rank: int,
) -> Pair | None:
    """Of the lowest rank, at least one, that keeps the energy; None where that is more than `max_rank`."""
    wanted, most = energy * matrix.double().square().sum(), min(max_rank, *matrix.shape)
    rank = min(_FIRST_RANK, most)
    while True:
        left, values, right = _leading(matrix, rank)
        kept = values.double().square().cumsum(0)
        if kept[-1] >= wanted or (rank == min(matrix.shape) and kept[-1] >= wanted * (1 - 1e-6)):
            rank = min(int((kept < wanted).sum()) + 1, len(kept))
            return Pair(values[:rank].sqrt()[:, None] * right[:rank], left[:, :rank] * values[:rank].sqrt())
        if rank == most:
            return None
        rank = min(2 * rank, most)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values: (out, rank), (rank,), (rank, in)."""
    columns = rank + _MORE_COLUMNS
    if 4 * columns >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        devices = [matrix.device] if matrix.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, columns, niter=_TURNS)
        right = right.T
    return left[:, :rank], values[:rank], right[:rank]
