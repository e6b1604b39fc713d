"""The leading singular vectors of a matrix with one short side, several times faster than by an SVD of it."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor

_linalg: Any = torch.linalg  # has no types


def leading_subspace(
    rows: Tensor,  # (m, n), float32 or float64
    count: int,
) -> tuple[Tensor, Tensor]:  # (m, count), (count, n)
    """The first `count` left singular vectors of a matrix, and the matrix in that basis. Not differentiable.

    From the eigenvectors of the Gram matrix of its small side; where squaring would blur the cut, by an SVD in float64.

    Raises:
        ValueError: an entry is not finite, or its square is not.
    """
    num_rows, num_columns = rows.shape
    if num_rows > num_columns:
        # From the right singular vectors V, the small side's: U S = rows V, and a QR takes U out of it.
        basis, _ = _linalg.qr(rows @ _eigenbasis(rows.t(), count))
    else:
        basis = _eigenbasis(rows, count)
    return basis, _in_basis(basis, rows)


def _in_basis(basis: Tensor, rows: Tensor) -> Tensor:
    """`basis.t() @ rows`. A product as thin as this keeps one thread of a CPU busy, a batch of eight keeps all."""
    width, left_over = divmod(rows.shape[1], 8)
    if left_over or width < 128:
        return basis.t() @ rows
    batch = torch.unflatten(rows, 1, (8, width)).transpose(0, 1)  # (8, m, n / 8)
    return (basis.t() @ batch).transpose(0, 1).flatten(1)


def _eigenbasis(rows: Tensor, count: int) -> Tensor:
    """The first `count` left singular vectors of a wide or square (m, n) matrix from its Gram matrix."""
    gram = _lower_gram(rows)
    if not isfinite(gram.trace().item()):  # a sum of squares: finite if and only if every entry is
        raise ValueError(
            f"cannot decompose the weight: its largest entry is {rows.abs().max().item()}, expected finite numbers "
            "whose squares float32 can hold. Check the checkpoint."
        )
    try:
        values, vectors = _linalg.eigh(gram, UPLO="L")
    except RuntimeError:  # torch.linalg.LinAlgError: many repeated eigenvalues, such as a constant weight's
        return _eigenbasis_in_float64(rows, count)
    # Squaring blurs singular values far below the largest: is the cut among those?
    if count < len(values) and gram.dtype == torch.float32 and bool(values[-count] < 1e-3 * values[-1]):
        return _eigenbasis_in_float64(rows, count)
    return vectors[:, -count:].flip(1)


def _eigenbasis_in_float64(rows: Tensor, count: int) -> Tensor:
    triangle = _linalg.qr(rows.double().t(), mode="r").R.t()
    return _linalg.svd(triangle, full_matrices=False).U[:, :count].to(rows.dtype)


def _lower_gram(rows: Tensor) -> Tensor:  # (m, m)
    """The lower triangle of `rows @ rows.t()`; of what lies above it, only a part is computed, the rest is zero."""
    num_rows = len(rows)
    gram = rows.new_zeros(num_rows, num_rows)
    step = max(-(-num_rows // 4), 64)  # four strips of columns: 5/8 of the products
    for start in range(0, num_rows, step):
        strip = slice(start, start + step)
        torch.mm(rows[start:], rows[strip].t(), out=gram[start:, strip])
    return gram
