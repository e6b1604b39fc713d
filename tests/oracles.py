"""Matrix product operators in plain numpy and float64: slow, obviously right, and sharing nothing with the library.

Core k has shape (bond_left, out_mode, in_mode, bond_right); rows and columns are row-major, first mode slowest.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

__all__ = ["mpo_entry", "mpo_to_matrix", "multi_index", "tt_svd"]


def multi_index(flat: int, modes: Sequence[int]) -> tuple[int, ...]:
    """The row-major digits of `flat`, first mode slowest."""
    digits = []
    for mode in reversed(modes):
        flat, digit = divmod(flat, mode)
        digits.append(digit)
    return tuple(reversed(digits))


def mpo_entry(cores: Sequence[np.ndarray], row: int, column: int) -> float:
    """One element by the formula: T1[:, i_1, j_1, :] · T2[:, i_2, j_2, :] · … · TN[:, i_N, j_N, :]."""
    rows = multi_index(row, [core.shape[1] for core in cores])
    columns = multi_index(column, [core.shape[2] for core in cores])
    product = np.eye(1)
    for core, i, j in zip(cores, rows, columns, strict=True):
        product = product @ core[:, i, j, :]
    return product.item()


def mpo_to_matrix(
    cores: Sequence[np.ndarray],  # each (bond_left, out_mode, in_mode, bond_right)
) -> np.ndarray:  # (out, in)
    """The whole matrix by one einsum; axes are numbered out 0…N−1, in N…2N−1, bonds 2N…3N."""
    num_cores = len(cores)
    operands = []
    for k, core in enumerate(cores):
        operands += [core.astype(np.float64), [2 * num_cores + k, k, num_cores + k, 2 * num_cores + k + 1]]
    tensor = np.einsum(*operands, list(range(2 * num_cores)), optimize="greedy")
    return tensor.reshape(prod(tensor.shape[:num_cores]), -1)


def tt_svd(
    weight: np.ndarray,  # (out, in)
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    max_bond: int,
) -> list[np.ndarray]:  # each (bond_left, out_mode, in_mode, bond_right)
    """The sequential truncated SVD of the interleaved tensor: U is the core, S Vᵀ goes on (Oseledets 2011, alg. 1)."""
    num_cores = len(out_modes)
    interleaved = [axis for k in range(num_cores) for axis in (k, num_cores + k)]
    rest = weight.astype(np.float64).reshape(*out_modes, *in_modes).transpose(interleaved)
    cores, bond = [], 1
    for out_mode, in_mode in zip(out_modes[:-1], in_modes[:-1], strict=True):
        unfolding = rest.reshape(bond * out_mode * in_mode, -1)
        # With A = L Q, the triangular L has the left singular vectors of A, and an SVD of few columns.
        triangular = np.linalg.qr(unfolding.T, mode="r").T
        u, s, _ = np.linalg.svd(triangular, full_matrices=False)
        kept = min(max_bond, len(s))
        cores.append(u[:, :kept].reshape(bond, out_mode, in_mode, kept))
        # Uᵀ A = S Vᵀ, but good to the last digits also where A is very wide and LAPACK's V is not.
        rest, bond = u[:, :kept].T @ unfolding, kept
    cores.append(rest.reshape(bond, out_modes[-1], in_modes[-1], 1))
    return cores
