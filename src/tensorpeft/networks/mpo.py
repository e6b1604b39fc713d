"""The matrix product operator: decompose a weight into cores, contract them, and the update made of them.

Core k has shape (b_{k-1}, i_k, j_k, b_k), b_0 = b_N = 1, and
`MPO(T)[(i_1..i_N), (j_1..j_N)] = T1[:, i_1, j_1, :] · T2[:, i_2, j_2, :] · … · TN[:, i_N, j_N, :]`,
the multi-indices row-major (first mode slowest). Source: DoTA (arXiv 2412.20891), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from tensorpeft.modes import bond_dimensions
from tensorpeft.networks.chains import (
    MPO,
    contract_to_halves,
    flat_cores,
    halves_at_start,
    halves_of_difference,
    sorted_halves,
)
from tensorpeft.networks.cut import Cut, Halves, Ready, fold
from tensorpeft.networks.derivatives import is_transformed
from tensorpeft.networks.dtypes import at_least_float32
from tensorpeft.networks.group import Parts, Tensors, parts_of
from tensorpeft.networks.subspace import Steps, run_together, subspace_steps
from tensorpeft.networks.update import BASE_DIGEST, AbstractDifference, AbstractSummedUpdate, keeping_dtype
from tensorpeft.networks.versions import Kept


class FrozenCores(nn.Module):
    """Cores that a base layer holds and that are never trained, and a digest of the layer's weight.

    Args:
        cores: each (bond_left, out_mode, in_mode, bond_right).
        digest: (4,), int64: tells this base from every other; saved with each adapter that starts here.
    """

    digest: Tensor

    def __init__(self, cores: Sequence[Tensor], digest: Tensor):
        super().__init__()
        self.num_cores = len(cores)
        for k, core in enumerate(cores, 1):
            self.register_buffer(f"core_{k}", core.contiguous())
        self.register_buffer("digest", digest)
        self._kept: Kept[Halves] = Kept()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenCores:
        """As torch's, but the dtype stays: the residual is that of these very numbers."""
        self._kept.clear()
        return super()._apply(keeping_dtype(fn), recurse)  # pyright: ignore[reportUnknownMemberType]

    def cores(self) -> tuple[Tensor, ...]:
        """First to last."""
        return tuple(getattr(self, f"core_{k}") for k in range(1, self.num_cores + 1))

    @torch.no_grad()
    def halves(self) -> Halves:
        """The cores contracted; kept, as they seldom change."""
        cores = self.cores()
        if torch.compiler.is_compiling():
            return contract_to_halves(cores)
        return self._kept.get(lambda: contract_to_halves(cores), cores)


class MpoUpdate(AbstractDifference, AbstractSummedUpdate):
    """`ΔW = MPO(cores) − MPO(start)`: zero, exactly, while the cores are their start.

    Args:
        cores: the trained cores, each (bond_left, out_mode, in_mode, bond_right); kept in float32 or float64.
        start: frozen cores of the same shapes, saved beside the trained ones; a base layer's own, which stay there, and
            whose digest is saved; None: nothing is subtracted.
        starts_at_projection: whether MPO(start) is an orthogonal projection of the base weight, as `decompose` gives.

    Source: DoTA, section 3.2; the paper subtracts MPO(start) from the base weight, we leave that untouched.
    """

    base_start: FrozenCores | None

    def __init__(
        self,
        cores: Sequence[Tensor],
        start: Sequence[Tensor] | FrozenCores | None = None,
        starts_at_projection: bool = False,
    ):
        super().__init__()
        self.num_cores = len(cores)
        self.has_start = start is not None
        self.starts_at_projection = starts_at_projection
        object.__setattr__(self, "base_start", None)
        if isinstance(start, FrozenCores):
            object.__setattr__(self, "base_start", start)  # a plain reference: it is the base layer's module
            self.register_buffer(BASE_DIGEST, start.digest.clone())
            start = ()
        for k, core in enumerate(cores, 1):
            # A clone: the start must not follow the trained core. Contiguous: FSDP shards no other parameter.
            core = at_least_float32(core.detach()).clone(memory_format=torch.contiguous_format)
            self.register_parameter(f"core_{k}", nn.Parameter(core))
        for k, core in enumerate(start or (), 1):
            core = at_least_float32(core.detach()).clone(memory_format=torch.contiguous_format)
            self.register_buffer(f"start_{k}", core)

    def cores(self) -> list[Tensor]:
        """The trained cores, first to last."""
        return [getattr(self, f"core_{k}") for k in range(1, self.num_cores + 1)]

    def starts(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Core by core."""
        return zip(self.cores(), self._start())

    def start(self) -> list[Tensor]:
        """The frozen start cores; empty if nothing is subtracted."""
        if self.base_start is not None:
            return list(self._start())
        # In the cores' dtype: where FSDP gathers those rounded, the start is still exactly the base.
        return [start.to(core.dtype) for core, start in self.starts()]

    def _start(self) -> Sequence[Tensor]:
        if self.base_start is not None:
            return self.base_start.cores()
        return [getattr(self, f"start_{k}") for k in range(1, self.num_cores + 1)] if self.has_start else []

    def cut(self) -> Cut:
        """Both networks, to be cut at the bond that makes the halves smallest."""
        start = tuple(self.start())
        if is_transformed():
            return Cut(MPO, tuple(self.cores()), start)
        left, right, *difference = parts_of(self)
        ready = Ready(Halves(left, right), Halves(*difference) if difference else None)
        return Cut(MPO, tuple(self.cores()), start, ready)

    def start_matrix(self) -> Tensor | None:
        """That of the frozen cores."""
        return contract(self.start()) if self.has_start else None

    def group_key(self) -> Hashable:
        """Equal for networks of equal shapes that start alike."""
        return tuple(core.shape for core in self.cores()), self.has_start, self.base_start is None

    def make_parts(
        self, members: Sequence[MpoUpdate], own: Sequence[Tensors], shared: Tensors, dtype: torch.dtype | None
    ) -> list[Parts]:
        """The two halves; where there is a start, also those of the difference to it.

        Not of a start that is the base layer's own: that layer puts the cores' network in its place. There the halves
        have the start's very bits as long as no core has moved.
        """
        shapes = tuple(core.shape for core in self.cores())
        cores = flat_cores([tensors[f"core_{k}"] for tensors in own for k in range(1, self.num_cores + 1)], len(own))
        parts: tuple[Tensor, ...]
        if not self.has_start:
            parts = sorted_halves(cores, shapes)
        elif self.base_start is not None:
            bases = [member.base_start for member in members if member.base_start is not None]
            start = flat_cores([core for base in bases for core in base.cores()], len(own)).to(cores)
            parts = halves_at_start(cores, start, [base.halves() for base in bases], shapes)
        else:
            start = [tensors[f"start_{k}"] for tensors in own for k in range(1, self.num_cores + 1)]
            # In the cores' dtype: where FSDP gathers those rounded, the start is still exactly the base.
            start = flat_cores([tensor.to(own[0]["core_1"].dtype) for tensor in start], len(own))
            parts = halves_of_difference(cores, start, shapes)
        return list(zip(*(part.unbind() for part in parts)))

    def tensor_name(self) -> str:
        """An operator of its own for every weight, told by its modes and bonds."""
        return self.extra_repr()

    def extra_repr(self) -> str:
        """Modes and bonds, as in `out 4·4·8·8·4, in 4·4·8·8·4, bonds 1·16·16·16·16·1`."""
        shapes = [core.shape for core in self.cores()]
        out, in_ = "·".join(str(s[1]) for s in shapes), "·".join(str(s[2]) for s in shapes)
        bonds = "·".join(["1", *(str(s[3]) for s in shapes)])
        return f"out {out}, in {in_}, bonds {bonds}, {'from start' if self.has_start else 'no start'}"


def decompose(
    weight: Tensor,  # (out, in), floating point
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    max_bond: int | Sequence[int],  # of all inner bonds, or of each of the N - 1
) -> list[Tensor]:  # N cores, each (bond_left, out_mode, in_mode, bond_right)
    """The cores of `weight` by TT-SVD of its interleaved tensor, in float32 (float64 for a float64 weight).

    Each bond keeps the leading left singular vectors of its unfolding as the core, and the rest goes on, so that all
    cores but the last are left-orthonormal and the last holds the singular values (the paper does not say where they
    go). At full bond the contraction is the weight; truncated, it is the orthogonal projection of the weight.

    An unfolding here is narrow (at most max_bond · i_k · j_k rows), so its singular vectors come from the
    eigenvectors of the Gram matrix of its small side: the same subspaces as an SVD.

    Raises:
        ValueError: the weight is not a finite floating-point matrix on a real device, the modes' products are not its
            shape, or `max_bond` is below 1 or not one per inner bond.

    Source: DoTA, section 3.1; TT-SVD: Oseledets (2011), algorithm 1.

    >>> weight = torch.randn(12, 8)
    >>> cores = decompose(weight, (3, 4), (2, 4), max_bond=6)
    >>> [tuple(core.shape) for core in cores]
    [(1, 3, 2, 6), (6, 4, 4, 1)]
    >>> torch.allclose(contract(cores), weight, atol=1e-5)
    True
    """
    return run_together([decomposition_steps(weight, out_modes, in_modes, max_bond)])[0]


def decomposition_steps(
    weight: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], max_bond: int | Sequence[int]
) -> Steps[list[Tensor]]:
    """`decompose`, to be run with others by `networks.subspace.run_together`."""
    bonds = bond_dimensions(out_modes, in_modes, max_bond)
    _check_weight(weight, out_modes, in_modes)
    num_cores = len(out_modes)
    weight = at_least_float32(weight)
    pairs = [i * j for i, j in zip(out_modes, in_modes)]
    # The leading bonds that cut nothing off cost nothing either: their cores are split from the first basis that does.
    head = next((k for k in range(1, num_cores) if prod(pairs[:k]) > bonds[k]), num_cores)
    rows = _interleave(weight.reshape(prod(out_modes[:head]), -1, prod(in_modes[:head]), prod(in_modes[head:])))
    basis, rest = (yield from subspace_steps(rows, bonds[head])) if head < num_cores else (rows.clone(), rows)
    cores = yield from _split_exactly(basis, out_modes[:head], in_modes[:head], bonds)
    for k in range(head, num_cores):
        left_out, left_in = prod(out_modes[k + 1 :]), prod(in_modes[k + 1 :])
        rest = rest.view(bonds[k], out_modes[k], left_out, in_modes[k], left_in).transpose(2, 3)
        rest = rest.reshape(bonds[k] * pairs[k], left_out * left_in)
        basis = rest
        if k + 1 < num_cores:
            basis, rest = yield from subspace_steps(rest, bonds[k + 1])
        cores.append(basis.view(bonds[k], out_modes[k], in_modes[k], bonds[k + 1]))
    return cores


def contract(
    cores: Sequence[Tensor],  # each (bond_left, out_mode, in_mode, bond_right)
) -> Tensor:  # (out, in)
    """The matrix of the cores. Differentiable.

    Raises:
        ValueError: neighbouring bonds differ, or the outer ones are not 1.
    """
    outer = [cores[0].shape[0], *(core.shape[3] for core in cores)]
    if outer[0] != 1 or outer[-1] != 1 or any(core.shape[0] != bond for core, bond in zip(cores, outer)):
        raise ValueError(
            f"the cores' shapes {[tuple(core.shape) for core in cores]} do not chain: each must start with the bond "
            "that the one before ends with, the first and the last bond being 1."
        )
    if len(cores) == 1:
        return cores[0].flatten(0, 1).flatten(1)
    return fold(contract_to_halves(cores))


def balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same operator with cores of one root mean square; an operator that is zero stays as it is.

    `decompose` leaves all of the weight's scale to the last core.
    """
    sizes = torch.stack([core.square().mean().sqrt() for core in cores])
    if not sizes.all():
        return list(cores)
    factors = sizes.log().mean().exp() / sizes
    return [core * factor for core, factor in zip(cores, factors)]


def random_cores(
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    max_bond: int | Sequence[int],
) -> list[Tensor]:  # N cores, each (bond_left, out_mode, in_mode, bond_right)
    """Gaussian cores whose contraction has entries of variance 1 / in, as a freshly initialised linear layer.

    Each core's standard deviation is `(bond_left · in_mode)^-½`, so that every product of cores keeps that scale.
    The paper says "Gaussian" without a scale.
    """
    bonds = bond_dimensions(out_modes, in_modes, max_bond)
    return [
        torch.randn(bonds[k], i, j, bonds[k + 1]) * (bonds[k] * j) ** -0.5
        for k, (i, j) in enumerate(zip(out_modes, in_modes))
    ]


def _check_weight(weight: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> None:
    if weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"cannot decompose a tensor of shape {tuple(weight.shape)}, {weight.dtype}, on {weight.device}: expected a "
            "floating-point matrix (out, in) on a real device."
        )
    if (prod(out_modes), prod(in_modes)) != tuple(weight.shape):
        raise ValueError(
            f"the modes {tuple(out_modes)} x {tuple(in_modes)} make a ({prod(out_modes)}, {prod(in_modes)}) matrix, "
            f"but the weight is {tuple(weight.shape)}: the modes of a side must multiply to its size."
        )


def _interleave(grouped: Tensor) -> Tensor:
    """(out_left, out_right, in_left, in_right) as the unfolding (out_left · in_left, out_right · in_right)."""
    return grouped.transpose(1, 2).reshape(grouped.shape[0] * grouped.shape[2], -1)


def _split_exactly(
    basis: Tensor,  # (out · in of the modes, bond), rows in the order (all outputs, all inputs)
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    bonds: Sequence[int],
) -> Steps[list[Tensor]]:
    """The cores of an orthonormal basis over several modes; nothing is cut off, all come out left-orthonormal."""
    cores: list[Tensor] = []
    rest = basis.view(1, prod(out_modes), prod(in_modes), -1)
    for k in range(len(out_modes) - 1):
        left_out, left_in = prod(out_modes[k + 1 :]), prod(in_modes[k + 1 :])
        rest = rest.reshape(bonds[k], out_modes[k], left_out, in_modes[k], left_in, -1).transpose(2, 3)
        rest = rest.reshape(bonds[k] * out_modes[k] * in_modes[k], -1)
        vectors, rest = yield from subspace_steps(rest, bonds[k + 1])
        cores.append(vectors.view(bonds[k], out_modes[k], in_modes[k], bonds[k + 1]))
        rest = rest.view(bonds[k + 1], left_out, left_in, -1)
    cores.append(rest.reshape(bonds[len(out_modes) - 1], out_modes[-1], in_modes[-1], -1))
    return cores
