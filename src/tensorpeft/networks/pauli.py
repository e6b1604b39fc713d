"""Orthonormal columns from a circuit of plane rotations, and the update `ΔW = s · U diag(λ) Vᵀ` made of two of them.

A size is padded to P = 2^q, whose indices are q bits ("qubits", the first slowest). The circuit rotates every bit by an
angle of its own; then each layer has two halves, on the pairs of bits (0, 1), (2, 3), … and (1, 2), (3, 4), …: a sign
for every pair (−1 where both bits are one) and a rotation of both of its bits. That is q + 2 L (q − 1) angles,
logarithmic in the size. Nothing of the size P x P is formed. Source: Quantum-PEFT (arXiv 2503.05431).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorpeft.networks.dtypes import at_least_float32, without_autocast
from tensorpeft.networks.low_rank import Factors
from tensorpeft.networks.update import AbstractLowRankUpdate

# Bits whose rotations are applied as one matrix: few products, none of them large.
_BITS_AT_ONCE = 4


def num_bits(size: int) -> int:
    """q, of the next power of two; at least 1.

    >>> [num_bits(size) for size in (1, 2, 768, 1024)]
    [1, 1, 10, 10]
    """
    return max((size - 1).bit_length(), 1)


def num_angles(size: int, num_layers: int) -> int:
    """The trained angles of one side.

    >>> [num_angles(4096, num_layers) for num_layers in (1, 2, 4)]
    [34, 56, 100]
    """
    bits = num_bits(size)
    return bits + 2 * num_layers * (bits - 1)


def orthonormal_rows(
    angles: Tensor,  # (*members, num_angles)
    size: int,
    num_layers: int,
    count: int,
) -> Tensor:  # (*members, count, size), in at least float32
    """The first `count` columns of the circuit's orthogonal matrix, as rows, cut off at `size`. Differentiable.

    They are orthonormal where the size is a power of two; else what is cut off is missing in their products.
    """
    bits, members = num_bits(size), angles.shape[:-1]
    angles = at_least_float32(angles).reshape(-1, angles.shape[-1])
    state = torch.eye(count, 2**bits, dtype=angles.dtype, device=angles.device).expand(len(angles), -1, -1)
    signs = [_signs(bits, first, angles) for first in (0, 1)]
    with without_autocast(angles.device):
        for k, by_bit in enumerate(_angles_by_bit(angles, bits, num_layers)):
            if k > 0:
                state = state * signs[(k - 1) % 2]
            state = _rotate(state, by_bit)
    return state[..., :size].reshape(*members, count, size)


def _angles_by_bit(angles: Tensor, bits: int, num_layers: int) -> Iterator[Tensor]:  # each (members, bits)
    """Of the first rotations, then of each half of each layer: zero for a bit that stands in no pair."""
    halves = ((0, bits // 2 * 2), (1, (bits - 1) // 2 * 2))  # the first bit that is rotated, and how many are
    counts = [count for _, count in halves] * num_layers
    parts: Sequence[Tensor] = torch.split(angles, [bits, *counts], dim=-1)  # pyright: ignore[reportUnknownMemberType]
    first, *rest = parts
    yield first
    for k, some in enumerate(rest):
        before, count = halves[k % 2]
        yield F.pad(some, (before, bits - before - count))


def _signs(bits: int, first: int, like: Tensor) -> Tensor:  # (2^bits,)
    """−1 where the bits of an odd number of the pairs (first, first + 1), (first + 2, first + 3), … are both one."""
    index = torch.arange(2**bits, device=like.device)
    odd = index & (index >> 1) & sum(1 << (bits - 2 - k) for k in range(first, bits - 1, 2))
    for shift in (16, 8, 4, 2, 1):
        odd = odd ^ (odd >> shift)
    return (1 - 2 * (odd & 1)).to(like.dtype)


def _rotate(
    state: Tensor,  # (members, rows, 2^bits)
    angles: Tensor,  # (members, bits)
) -> Tensor:  # as `state`
    """Every bit rotated by its angle, `[[cos θ/2, −sin θ/2], [sin θ/2, cos θ/2]]`."""
    cos, sin = torch.cos(angles / 2), torch.sin(angles / 2)
    rotations = torch.stack([cos, -sin, sin, cos], -1).view(*angles.shape, 2, 2).unbind(1)  # each (members, 2, 2)
    for start in range(0, len(rotations), _BITS_AT_ONCE):
        matrix = reduce(_kronecker, rotations[start : start + _BITS_AT_ONCE])  # (members, d, d)
        # Its bits are the first; the product leaves them the last, so that all are in order again in the end.
        columns = torch.unflatten(state, 2, (matrix.shape[-1], -1)).mT.flatten(1, 2)
        state = torch.bmm(columns, matrix.mT).view(state.shape)
    return state


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    """Of the last two axes."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2)


class PauliUpdate(AbstractLowRankUpdate):
    """`ΔW = scale · U diag(λ) Vᵀ`: U (out, r) and V (in, r) from circuits; λ is zero, the angles are the method's to
    fill.

    Args:
        out: rows of the weight.
        in_: columns.
        rank: r, cut to the smaller of both.
        num_layers: L of both circuits.
        scale: s.
    """

    def __init__(self, out: int, in_: int, rank: int, num_layers: int, scale: float):
        super().__init__()
        self.out = out
        self.in_ = in_
        self.num_layers = num_layers
        self.scale = scale
        self.up_angles = nn.Parameter(torch.zeros(num_angles(out, num_layers)))
        self.down_angles = nn.Parameter(torch.zeros(num_angles(in_, num_layers)))
        self.diagonal = nn.Parameter(torch.zeros(min(rank, out, in_)))

    def group_key(self) -> Hashable:
        """Equal where all sizes are."""
        return self.out, self.in_, len(self.diagonal), self.num_layers, self.scale

    def factors_from(self, tensors: Mapping[str, Tensor]) -> Factors:
        """Vᵀ, the scaled λ and U."""
        diagonal = tensors["diagonal"]
        rank = diagonal.shape[-1]
        down = orthonormal_rows(tensors["down_angles"], self.in_, self.num_layers, rank)
        up = orthonormal_rows(tensors["up_angles"], self.out, self.num_layers, rank)
        return Factors(down, diagonal * self.scale, up.mT)

    def tensor_name(self) -> str:
        """Circuits of its own for every weight, told by their sizes."""
        return self.extra_repr()

    def extra_repr(self) -> str:
        """Sizes, as in `U 4096 (2^12) · V 4096 (2^12), r 4, L 1`."""
        sides = " · ".join(f"{name} {size} (2^{num_bits(size)})" for name, size in (("U", self.out), ("V", self.in_)))
        return f"{sides}, r {len(self.diagonal)}, L {self.num_layers}"
