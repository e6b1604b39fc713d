"""Where the energy of a sum of outer products is that is never formed: of a weight's gradient `G = Σ dyᵀ x`.

Two thin products are gathered instead, `G Ω` and `Gᵀ Ψ` with Gaussian Ω (in, k) and Ψ (out, l) of unit variance over k
and l. In the mean `G Ω Ωᵀ Gᵀ = G Gᵀ`, so that the leading singular vectors of G Ω are nearly those of G; and
`G ≈ (G Ω) (Ψᵀ G Ω)⁺ (Ψᵀ G)`. Source: the generalised Nyström approximation (Nakatsukasa, arXiv 2009.11392), l > k for
its stability. Its own leading vectors hold less where the spectrum falls slowly (tests/networks/test_sketch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tensorpeft.networks.dtypes import without_autocast

_torch: Any = torch  # linalg, norms and random states have no types, or not all

# Columns of Ω: so many times the rank, and some more; those of Ψ are so many times as many.
_WIDTH, _OVERSAMPLING, _STABILITY = 2, 16, 1.5
_ROUNDING = 1e-5  # of the largest singular value, in float32
_ITERATIONS = 8  # weights' spectra fall slowly


class Gradient(NamedTuple):
    """A matrix `G = left · core · rightᵀ`, with `left leftᵀ = G Gᵀ` and `right rightᵀ = Gᵀ G`; all of it nearly."""

    left: Tensor  # (out, k)
    core: Tensor  # (k, l)
    right: Tensor  # (in, l)


class Noise:
    """The random matrices of the sketches of one gradient, the same on every device and for all weights of one size.

    Args:
        seed: what they are made from.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._known: dict[tuple[int, int, bool, torch.device], Tensor] = {}

    def of(self, size: int, columns: int, is_left: bool, device: torch.device) -> Tensor:  # (size, columns)
        """Gaussian, of variance 1 / columns; other numbers on each side. Where nothing is cut off, the identity."""
        key = (size, columns, is_left, device)
        if key not in self._known:
            generator = torch.Generator().manual_seed(2 * self._seed + is_left)
            noise = torch.randn(size, columns, generator=generator, dtype=torch.float32, device="cpu") / sqrt(columns)
            self._known[key] = (torch.eye(size, dtype=torch.float32) if columns == size else noise).to(device)
        return self._known[key]


class Sketch:
    """What is kept of a matrix `Σ dyᵀ x` (out, in) until its leading part is asked for: (out + in) · O(rank) numbers.

    The sum of two sketches of one seed is the sketch of the matrices' sum.

    Args:
        out: rows.
        in_: columns.
        rank: how many leading singular vectors will be asked for.
        noise: the random matrices.
        device: that the numbers are on.
    """

    def __init__(self, out: int, in_: int, rank: int, noise: Noise, device: torch.device):
        left, right = _widths(out, in_, rank)
        self._omega = noise.of(in_, left, False, device)
        self._psi = noise.of(out, right, True, device)
        self.left = torch.zeros(out, self._omega.shape[1], dtype=torch.float32, device=device)  # G Ω
        self.right = torch.zeros(in_, self._psi.shape[1], dtype=torch.float32, device=device)  # Gᵀ Ψ

    @torch.no_grad()
    def add(
        self,
        x: Tensor,  # (*batch, in)
        grad_output: Tensor,  # (*batch, out)
    ) -> None:
        """Add `grad_outputᵀ x`."""
        rows_x, rows_y = (t.reshape(-1, t.shape[-1]).to(self._omega) for t in (x, grad_output))
        with without_autocast(self.left.device):
            self.left.addmm_(rows_y.t(), rows_x @ self._omega)
            self.right.addmm_(rows_x.t(), rows_y @ self._psi)

    @torch.no_grad()
    def gradient(self) -> Gradient:
        """What is known of the matrix."""
        left, values, right = _svd(self._psi.t() @ self.left)  # of Ψᵀ G Ω
        kept = values > _ROUNDING * values[0]
        core = right[:, kept] / values[kept] @ left[:, kept].t()
        sides = self._omega, self._psi
        # Then `left · core · rightᵀ` is G itself, and not only nearly.
        if not kept.all() or any(side.shape[0] == side.shape[1] for side in sides):
            return _of_product(self.left, core, self.right)
        return Gradient(self.left, core, self.right)


def sketch_bytes(out: int, in_: int, rank: int) -> int:
    """What a `Sketch` holds while it gathers; the random matrices, which others share, apart."""
    left, right = _widths(out, in_, rank)
    return 4 * (out * left + in_ * right)


def _widths(out: int, in_: int, rank: int) -> tuple[int, int]:
    """Columns of Ω and of Ψ."""
    width = _WIDTH * rank + _OVERSAMPLING
    return min(width, in_), min(int(_STABILITY * width), out)


@torch.no_grad()
def exact(matrix: Tensor) -> Gradient:  # of (out, in)
    """The same of a matrix that is there."""
    return _of_svd(*_svd(matrix))


@torch.no_grad()
def leading_part(
    matrix: Tensor,  # (out, in)
    rank: int,
) -> Gradient:
    """The same of its leading singular vectors, by subspace iteration; equal at every call on one machine."""
    matrix, generator = matrix.float(), torch.Generator().manual_seed(0)
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    right = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32, device="cpu")
    right = right.to(matrix.device)
    for _ in range(_ITERATIONS):
        left, _ = _torch.linalg.qr(matrix @ right)
        right, _ = _torch.linalg.qr(matrix.t() @ left)
    left, _ = _torch.linalg.qr(matrix @ right)
    inner, values, right = _svd(left.t() @ matrix)
    return _of_svd(left @ inner, values, right)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (m, k), (k,), (n, k)
    left, values, right = cast("tuple[Tensor, ...]", _torch.linalg.svd(matrix, full_matrices=False))
    return left, values, right.t()


def _of_product(left: Tensor, core: Tensor, right: Tensor) -> Gradient:
    """The same of `left · core · rightᵀ`, which is not formed."""
    (q_left, r_left), (q_right, r_right) = (_torch.linalg.qr(side) for side in (left, right))
    inner_left, values, inner_right = _svd(r_left @ core @ r_right.t())
    return _of_svd(q_left @ inner_left, values, q_right @ inner_right)


def _of_svd(left: Tensor, values: Tensor, right: Tensor) -> Gradient:
    kept = values > 0
    left, values, right = left[:, kept], values[kept], right[:, kept]
    return Gradient(left * values, values.reciprocal().diag(), right * values)


@torch.no_grad()
def leading_frames(
    gradients: Sequence[Gradient],  # of one shape
    rank: int,
) -> tuple[Tensor, Tensor]:  # (out, r) and (in, r), orthonormal columns, r at most the rank
    """U and V: the leading singular vectors of the gradients side by side, and of those below each other.

    Of one gradient they are its own; of several those of their Tucker2 tensor by HOSVD (De Lathauwer et al., 2000).
    """
    left = leading_columns([gradient.left for gradient in gradients], rank)
    return left, leading_columns([gradient.right for gradient in gradients], rank)


def leading_columns(
    parts: Sequence[Tensor],  # each (size, *)
    rank: int,
) -> Tensor:  # (size, at most rank)
    """Leading left singular vectors of matrices that stand side by side."""
    together = torch.cat(list(parts), dim=1)
    if together.shape[1] > together.shape[0]:
        return _torch.linalg.eigh(together @ together.t()).eigenvectors.flip(1)[:, :rank]
    return _torch.linalg.svd(together, full_matrices=False)[0][:, :rank]


def put_columns(
    factor: Tensor,  # (size, r)
    columns: Tensor,  # (size, at most r)
) -> None:
    """Put these columns first; the others, of a rank that no frame has, stay as they are."""
    factor[:, : columns.shape[1]] = columns.to(factor)
