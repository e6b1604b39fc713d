"""The leading singular vectors of a matrix with one short side, several times faster than by an SVD of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

_linalg: Any = torch.linalg  # has no types

Result = TypeVar("Result")
# A computation that hands out symmetric matrices, of which the lower triangle counts, and goes on with their
# eigenvalues, ascending, and eigenvectors; or with None where the solver failed.
Steps = Generator[Tensor, tuple[Tensor, Tensor] | None, Result]


@torch.no_grad()
def run_together(computations: Sequence[Steps[Result]]) -> list[Result]:
    """Their results: computations in step with each other, eigenvectors of matrices of one size in one call.

    On a GPU, where such a call takes as long for several matrices as for one.
    """
    results: dict[int, Result] = {}
    waiting: dict[int, Tensor] = {}

    def go_on(k: int, spectrum: tuple[Tensor, Tensor] | None) -> None:
        try:
            waiting[k] = computations[k].send(spectrum)
        except StopIteration as end:
            results[k] = end.value

    for k in range(len(computations)):
        go_on(k, None)
    while waiting:
        grams, by_form = dict(waiting), dict[object, list[int]]()
        waiting.clear()
        for k, gram in grams.items():
            by_form.setdefault((gram.shape, gram.dtype, gram.device), []).append(k)
        for members in by_form.values():
            for k, spectrum in zip(members, _spectra([grams[k] for k in members])):
                go_on(k, spectrum)
    return [results[k] for k in range(len(computations))]


def _spectra(grams: Sequence[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
    try:
        values, vectors = _linalg.eigh(grams[0] if len(grams) == 1 else torch.stack(list(grams)), UPLO="L")
    except RuntimeError:  # torch.linalg.LinAlgError: many repeated eigenvalues, such as a constant weight's
        return [None] if len(grams) == 1 else [spectrum for gram in grams for spectrum in _spectra([gram])]
    return [(values, vectors)] if len(grams) == 1 else list(zip(values, vectors))


def leading_subspace(
    rows: Tensor,  # (m, n), float32 or float64
    count: int,
) -> tuple[Tensor, Tensor]:  # (m, count), (count, n)
    """The first `count` left singular vectors of a matrix, and the matrix in that basis. Not differentiable.

    From the eigenvectors of the Gram matrix of its small side; where squaring would blur the cut, by an SVD in float64.

    Raises:
        ValueError: an entry is not finite, or its square is not.
    """
    return run_together([subspace_steps(rows, count)])[0]


def subspace_steps(rows: Tensor, count: int) -> Steps[tuple[Tensor, Tensor]]:
    """`leading_subspace`, to be run with others."""
    num_rows, num_columns = rows.shape
    if num_rows > num_columns:
        # From the right singular vectors V, the small side's: U S = rows V, and a QR takes U out of it.
        small = yield from _eigenbasis(rows.t(), count)
        basis, _ = _linalg.qr(rows @ small)
    else:
        basis = yield from _eigenbasis(rows, count)
    return basis, _in_basis(basis, rows)


def _in_basis(basis: Tensor, rows: Tensor) -> Tensor:
    """`basis.t() @ rows`. A product as thin as this keeps one thread of a CPU busy, a batch of eight keeps all."""
    width, left_over = divmod(rows.shape[1], 8)
    if left_over or width < 128:
        return basis.t() @ rows
    batch = torch.unflatten(rows, 1, (8, width)).transpose(0, 1)  # (8, m, n / 8)
    return (basis.t() @ batch).transpose(0, 1).flatten(1)


def _eigenbasis(rows: Tensor, count: int) -> Steps[Tensor]:
    """The first `count` left singular vectors of a wide or square (m, n) matrix from its Gram matrix."""
    gram = _lower_gram(rows)
    if not isfinite(gram.trace().item()):  # a sum of squares: finite if and only if every entry is
        raise ValueError(
            f"cannot decompose the weight: its largest entry is {rows.abs().max().item()}, expected finite numbers "
            "whose squares float32 can hold. Check the checkpoint."
        )
    spectrum = yield gram
    if spectrum is None:
        return _eigenbasis_in_float64(rows, count)
    values, vectors = spectrum
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
