"""Weights of one shape as slices of a tensor, low-rank after a Fourier transform along the stack.

With D_k = Σ_j ω^{-jk} W_j, ω = exp(2πi / n), an update is `ΔW_j = 1/n Σ_k ω^{jk} U_k S_k V_kᴴ` for U_k (out, r), S_k
diagonal or (r, r), V_k (in, r). The D_k of real weights come in conjugate pairs, D_{n-k} = conj D_k; so only the slices
k <= n / 2 are held, as n real ones: Re_0, Re_1, Im_1, Re_2, Im_2, …, ending with Re_{n/2} if n is even.

Two complex products of r columns each are one real product of 2 r: `Re(P Vᴴ) = Re P Re Vᵀ + Im P Im Vᵀ`. So ΔW_j is a
product over a bond of n r, whose right side all weights share, and no transform of a weight's size is ever made.
Sources: LoRA-PT (arXiv 2407.11292), tCURLoRA (arXiv 2501.02227).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import pi
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tensorpeft.networks.cut import Cut, Halves, Network, fold
from tensorpeft.networks.dtypes import at_least_float32, without_autocast
from tensorpeft.networks.update import AbstractDifference, AbstractSummedUpdate, SharedFactors

_linalg: Any = torch.linalg  # has no types
_fft: Any = torch.fft  # likewise


class Triplets(NamedTuple):
    """The factors of a stack of n weights, real, in the order of the head of this file."""

    left: Tensor  # (n, out, r)
    core: Tensor  # (n, r): diagonals; or (n, r, r)
    right: Tensor  # (n, in, r)


def empty_triplets(count: int, out: int, in_: int, rank: int, has_diagonal: bool) -> Triplets:
    """Such of these sizes, on the meta device."""
    core = (count, rank) if has_diagonal else (count, rank, rank)
    shapes = ((count, out, rank), core, (count, in_, rank))
    return Triplets(*(torch.empty(shape, device="meta") for shape in shapes))


class StackFactors(AbstractDifference, SharedFactors):
    """The factors of several stacks, each under its own name: `768x768_U`, `768x768_S`, `768x768_V`.

    Args:
        stacks: name of a stack -> its factors; kept in float32 or float64.
        trains_all: whether U and V are trained beside S, and the update is the difference to where they all start; if
            not, they are frozen and there is nothing to subtract.
    """

    def __init__(self, stacks: Mapping[str, Triplets], trains_all: bool):
        super().__init__()
        self.trains_all = trains_all
        self.described = {name: _described(triplets) for name, triplets in stacks.items()}
        for name, triplets in stacks.items():
            for factor, tensor in zip("USV", triplets):
                # A clone: the start must not follow the trained one. Contiguous: FSDP shards no other parameter.
                tensor = at_least_float32(tensor.detach()).clone(memory_format=torch.contiguous_format)
                if trains_all or factor == "S":
                    self.register_parameter(f"{name}_{factor}", nn.Parameter(tensor))
                else:
                    self.register_buffer(f"{name}_{factor}", tensor)
                if trains_all:
                    self.register_buffer(f"start_{name}_{factor}", tensor.clone())

    def starts(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Factor by factor."""
        return (
            (getattr(self, name.removeprefix("start_")), start)
            for name, start in self._buffers.items()
            if start is not None and self.trains_all
        )

    def extra_repr(self) -> str:
        """Modes of every stack."""
        return "; ".join(f"{name}: {text}" for name, text in self.described.items())


class StackUpdate(AbstractSummedUpdate):
    """One weight of a stack.

    Args:
        shared: the factors.
        stack: the name of this weight's stack in them.
        index: its place in the stack.
    """

    def __init__(self, shared: StackFactors, stack: str, index: int):
        super().__init__(shared)
        self.stack = stack
        self.index = index
        self.network = Network(partial(_halves, index))

    def cut(self) -> Cut:
        """The halves `U S`, turned to this weight's place, and Vᵀ, over the bond of n r; likewise of the start."""
        shared = cast(StackFactors, self.shared)
        tensors = shared.tensors()
        cores = [tensors[f"{self.stack}_{factor}"] for factor in "USV"]
        start = [tensors[f"start_{self.stack}_{factor}"] for factor in "USV"] if shared.trains_all else []
        # In the cores' dtype: where FSDP gathers those rounded, the start is still exactly the base.
        return Cut(self.network, tuple(cores), tuple(tensor.to(cores[0].dtype) for tensor in start))

    def start_matrix(self) -> Tensor | None:
        """That of the frozen factors."""
        cut = self.cut()
        return fold(cut.network.halves(cut.start)) if cut.start else None

    def tensor_name(self) -> str:
        """The stack and its modes."""
        return f"{self.stack}: {cast(StackFactors, self.shared).described[self.stack]}"

    def extra_repr(self) -> str:
        """Which weight of which stack."""
        return f"{self.stack}, weight {self.index}"


def _described(triplets: Triplets) -> str:
    (count, out, rank), in_ = triplets.left.shape, triplets.right.shape[1]
    return f"stack {count} · U {out} · V {in_}, r {rank}"


class _Order(NamedTuple):
    """Of each of the n real slices: where the real and the imaginary part of its complex slice are."""

    frequency: Tensor  # k
    real: Tensor
    imaginary: Tensor  # of a slice that is real: anything
    other: Tensor  # the part that it is not itself
    sign: Tensor  # of (its place in a product of) the other part: −1 in a real part, 1 in an imaginary one, 0 without


def _order(count: int, device: torch.device) -> _Order:
    place = torch.arange(count, device=device)
    frequency = (place + 1) // 2
    is_imaginary = (place % 2 == 0) & (place > 0)
    is_alone = (place == 0) | ((place == count - 1) & ~is_imaginary)
    real, imaginary = place - is_imaginary.long(), (place + (~is_imaginary).long()).clamp(max=count - 1)
    other = torch.where(is_imaginary, real, imaginary).where(~is_alone, place)
    sign = (2 * is_imaginary.long() - 1) * (~is_alone).long()
    return _Order(frequency, real, imaginary, other, sign)


def _halves(index: int, factors: Sequence[Tensor]) -> Halves:
    left, core, right = map(at_least_float32, factors)
    count, out, rank = left.shape
    order = _order(count, left.device)
    with without_autocast(left.device):
        # The core times ω^{jk} / n, and twice where k stands for n − k too.
        turn = (order.frequency * index % count).double() * (2 * pi / count)
        weight = (1 + order.sign.abs()).double() / count
        scale, cross = weight * turn.cos(), weight * turn.sin() * order.sign
        scale, cross = (factor.to(core.dtype).view(-1, *[1] * (core.ndim - 1)) for factor in (scale, cross))
        core = core * scale + core[order.other] * cross
        # U times that.
        sign = order.sign.to(core.dtype).view(-1, *[1] * (core.ndim - 1))
        own, other = core[order.real], core[order.imaginary] * sign
        if core.ndim == 2:
            turned = left * own.unsqueeze(1) + left[order.other] * other.unsqueeze(1)
        else:
            turned = torch.bmm(left, own) + torch.bmm(left[order.other], other)
    return Halves(
        turned.transpose(0, 1).reshape(out, 1, count * rank),
        right.transpose(1, 2).reshape(count * rank, 1, right.shape[1]),
    )


def _packed(
    slices: Sequence[Tensor],  # complex, of the frequencies 0 to n / 2
    count: int,  # n
) -> Tensor:  # (n, …), real
    """In the order of the head of this file."""
    parts = [part for tensor in slices for part in (tensor.real, tensor.imag)]
    return torch.stack([parts[0], *parts[2:]][:count])


def _spectrum(
    weights: Tensor,  # (n, out, in)
) -> Tensor:  # (n // 2 + 1, out, in), complex
    """D_0, D_1, ….

    Raises:
        ValueError: an entry is not finite.
    """
    weights = at_least_float32(weights)
    if not bool(weights.isfinite().all()):
        raise ValueError("cannot decompose the weights: expected finite numbers. Check the checkpoint.")
    return _fft.rfft(weights, dim=0)  # type: ignore[no-any-return]


@torch.no_grad()
def leading_triplets(
    weights: Tensor,  # (n, out, in), floating point
    rank: int,
) -> Triplets:
    """The leading singular triplets of every D_k (a truncated t-SVD), in float32 (float64 for float64 weights).

    Raises:
        ValueError: an entry is not finite.
    """
    spectrum, count = _spectrum(weights), len(weights)
    found = [_leading(matrix.real if k == 0 or 2 * k == count else matrix, rank) for k, matrix in enumerate(spectrum)]
    return Triplets(*(_packed([factor.to(spectrum.dtype) for factor in factors], count) for factors in zip(*found)))


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:  # (out, r), (r,), (in, r)
    """From the eigenvectors of the Gram matrix of the smaller side: a fraction of an SVD's time."""
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = _leading(matrix.mH, rank)
        return left, values, right
    try:
        basis = _linalg.eigh(matrix.mH @ matrix).eigenvectors[:, -rank:].flip(1)
    except RuntimeError:  # torch.linalg.LinAlgError: many repeated eigenvalues, such as a constant weight's
        basis = _linalg.svd(matrix, full_matrices=False).Vh.mH[:, :rank]
    left, values, turn = _linalg.svd(matrix @ basis, full_matrices=False)
    return left, values, basis @ turn.mH


@torch.no_grad()
def columns_and_rows(
    weights: Tensor,  # (n, out, in), floating point
    rank: int,
) -> Triplets:
    """C_k = D_k[:, J] / c, a core of zeros and R_kᴴ = D_k[I, :]ᴴ, for the same J and I in all slices.

    c is the root mean square of all D_k[I, J]: cores of about one are then as large as the t-CUR decomposition's own,
    the inverses of these blocks, and move the weights by about themselves.
    J are the columns with the largest sum of lengths over all D_k, I the rows with the largest one within them.

    Raises:
        ValueError: an entry is not finite.
    """
    spectrum, count = _spectrum(weights), len(weights)
    times = torch.tensor([1 if 2 * k % count == 0 else 2 for k in range(len(spectrum))], device=spectrum.device)
    columns = _largest(_linalg.vector_norm(spectrum, dim=1), times, rank)
    left = spectrum[:, :, columns]
    rows = _largest(_linalg.vector_norm(left, dim=2), times, rank)
    squares = _linalg.vector_norm(left[:, rows], dim=(1, 2)).square() @ times.to(left.real.dtype)
    unit = (squares / (count * rank**2)).sqrt()
    left = left / unit.where(unit > 0, 1)
    right = spectrum[:, rows].mH.resolve_conj()
    core = left.real.new_zeros(count, rank, rank)
    return Triplets(_packed(list(left), count), core, _packed(list(right), count))


def _largest(lengths: Tensor, times: Tensor, number: int) -> Tensor:  # (number,)
    """The places of the largest sums over the slices, the first of equal ones."""
    return (lengths * times[:, None]).sum(0).sort(descending=True, stable=True).indices[:number]
