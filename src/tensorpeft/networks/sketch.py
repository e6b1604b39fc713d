"""The leading singular vectors of a sum of outer products that is never formed: of a weight's gradient `G = Σ dyᵀ x`.

Two thin products are gathered instead, `G Ω` and `Gᵀ Ψ` with Gaussian Ω (in, k) and Ψ (out, l), from which
`G ≈ (G Ω) (Ψᵀ G Ω)⁺ (Ψᵀ G)`. Source: the generalised Nyström approximation (Nakatsukasa, arXiv 2009.11392), l > k for
its stability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Further columns of Ω beside the rank that is asked for, and how many times as many Ψ has.
_OVERSAMPLING, _STABILITY = 16, 1.5
_ITERATIONS = 8  # weights' spectra fall slowly
_ROUNDING = 1e-5  # of the largest singular value, in float32
_SWEEPS = 3  # of the alternation between the two sides of shared frames; the first one finds nearly all


class LowRankMatrix(NamedTuple):
    """A matrix `left · diag(values) · rightᵀ`, its singular value decomposition."""

    left: Tensor  # (out, k), orthonormal columns
    values: Tensor  # (k,), descending
    right: Tensor  # (in, k), orthonormal columns

    def cut(self, rank: int) -> LowRankMatrix:
        """Its leading part."""
        return LowRankMatrix(self.left[:, :rank], self.values[:rank], self.right[:, :rank])


class Sketch:
    """What is kept of a matrix `Σ dyᵀ x` (out, in) until its leading part is asked for: (out + in) · O(rank) numbers.

    The sum of two sketches of one seed is the sketch of the matrices' sum.

    Args:
        out: rows.
        in_: columns.
        rank: how many leading singular vectors will be asked for.
        seed: of Ω and Ψ, which are the same on every device.
        device: that the numbers are on.
    """

    def __init__(self, out: int, in_: int, rank: int, seed: int, device: torch.device):
        size = min(rank + _OVERSAMPLING, out, in_)
        generator = torch.Generator().manual_seed(seed)
        self._from_right = torch.randn(in_, size, generator=generator).to(device)  # Ω
        self._from_left = torch.randn(out, min(int(_STABILITY * size), out), generator=generator).to(device)  # Ψ
        self.right_product = torch.zeros(out, size, device=device)  # G Ω
        self.left_product = torch.zeros(in_, self._from_left.shape[1], device=device)  # Gᵀ Ψ

    @torch.no_grad()
    def add(
        self,
        x: Tensor,  # (*batch, in)
        grad_output: Tensor,  # (*batch, out)
    ) -> None:
        """Add `grad_outputᵀ x`."""
        rows_x, rows_y = (t.reshape(-1, t.shape[-1]).to(self._from_right) for t in (x, grad_output))
        self.right_product.addmm_(rows_y.t(), rows_x @ self._from_right)
        self.left_product.addmm_(rows_x.t(), rows_y @ self._from_left)

    @torch.no_grad()
    def matrix(self) -> LowRankMatrix:
        """The approximation, of rank at most that asked for and the oversampling."""
        core = self._from_left.t() @ self.right_product  # Ψᵀ G Ω
        left, values, right = torch.linalg.svd(core, full_matrices=False)
        kept = values > _ROUNDING * values[0]
        up = self.right_product @ (right.t()[:, kept] / values[kept])
        return product_svd(up, self.left_product @ left[:, kept])


def product_svd(
    up: Tensor,  # (out, k)
    down: Tensor,  # (in, k)
) -> LowRankMatrix:
    """The singular value decomposition of `up downᵀ`."""
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down)
    left, values, right = torch.linalg.svd(r_up @ r_down.t(), full_matrices=False)
    return LowRankMatrix(q_up @ left, values, q_down @ right.t())


@torch.no_grad()
def leading_vectors(
    matrix: Tensor,  # (out, in)
    rank: int,
) -> LowRankMatrix:
    """Its leading singular vectors, by subspace iteration; the same at every call on one machine."""
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        found = torch.svd_lowrank(matrix.float(), min(rank + _OVERSAMPLING, *matrix.shape), niter=_ITERATIONS)
    return LowRankMatrix(*found).cut(rank)


@torch.no_grad()
def shared_frames(
    matrices: Sequence[LowRankMatrix],  # of one shape
    rank: int,
) -> tuple[Tensor, Tensor]:  # (out, r) and (in, r), orthonormal columns, r at most the rank
    """U and V of one Tucker2 tensor of all matrices: those that hold much of the energy `Σ ‖Uᵀ M V‖²`, by alternation.

    Source: HOSVD and HOOI (De Lathauwer et al., 2000).
    """
    scaled = [matrix.left * matrix.values for matrix in matrices]
    right = _leading([matrix.right * matrix.values for matrix in matrices], rank)
    left = _leading(scaled, rank)
    for _ in range(_SWEEPS if len(matrices) > 1 else 0):
        left = _leading([part @ (matrix.right.t() @ right) for part, matrix in zip(scaled, matrices)], rank)
        right = _leading([matrix.right @ (part.t() @ left) for part, matrix in zip(scaled, matrices)], rank)
    return left, right


def _leading(parts: Sequence[Tensor], rank: int) -> Tensor:
    """Leading left singular vectors of matrices that stand side by side."""
    together = torch.cat(list(parts), dim=1)
    if together.shape[1] > together.shape[0]:
        return torch.linalg.eigh(together @ together.t()).eigenvectors.flip(1)[:, :rank]
    return torch.linalg.svd(together, full_matrices=False)[0][:, :rank]


def put_columns(
    factor: Tensor,  # (size, r)
    columns: Tensor,  # (size, at most r)
) -> None:
    """Put these columns first; the others, of a rank that no frame has, stay as they are."""
    factor[:, : columns.shape[1]] = columns.to(factor)
