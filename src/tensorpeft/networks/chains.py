"""The contraction of matrix product operators to two halves, and of many of equal shapes in one go.

Each network is a row, its cores one after the other (`flat_cores`). Inside a chain the modes stand in the order
of the cores, (i_1 j_1 i_2 j_2 …), as a product of cores leaves them: they are sorted into outputs and inputs once per
half, not once per core.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorpeft.networks.cut import Halves, Network
from tensorpeft.networks.dtypes import at_least_float32, without_autocast


def flat_cores(cores: Sequence[Tensor], num_networks: int) -> Tensor:  # (networks, elements of a network)
    """The cores of several networks of equal shapes, in float32 (or float64)."""
    return at_least_float32(torch.cat([core.flatten() for core in cores]).view(num_networks, -1))


def _chains(flat: Tensor, shapes: Sequence[torch.Size], position: int) -> tuple[Tensor, Tensor]:
    """The contractions of the cores on both sides of a bond: (networks, modes, bond) and (networks, bond, modes)."""
    parts: Sequence[Tensor] = torch.split(flat, [shape.numel() for shape in shapes], dim=1)  # pyright: ignore
    cores = [part.view(-1, *shape) for part, shape in zip(parts, shapes)]
    left, right = cores[0].flatten(1, 3), cores[-1].flatten(2)
    with without_autocast(flat.device):
        for core in cores[1:position]:
            left = torch.bmm(left, core.flatten(2)).view(len(flat), -1, core.shape[4])
        for core in reversed(cores[position:-1]):
            right = torch.bmm(core.flatten(1, 3), right).view(len(flat), core.shape[1], -1)
    return left, right


def sorted_halves(flat: Tensor, shapes: tuple[torch.Size, ...]) -> Halves:  # with a leading axis of networks
    """The halves of networks whose cores have these shapes, cut where they are smallest. Differentiable."""
    position, *modes = _plan(shapes)
    return Halves(*(m.sort(chain).reshape(-1, *m.sizes) for chain, m in zip(_chains(flat, shapes, position), modes)))


def halves_of_difference(
    cores: Tensor,  # flat
    start: Tensor,  # flat
    shapes: tuple[torch.Size, ...],
) -> tuple[Tensor, ...]:  # each with a leading axis of networks
    """The halves of the cores, and those of MPO(cores) − MPO(start), zero where all cores are at their start."""
    position, *modes = _plan(shapes)
    with torch.no_grad():
        moved = (cores != start).any(1).to(cores.dtype)
        left, right = sorted_halves(start, shapes)
    return _SideBySide.apply(*_chains(cores, shapes, position), left, right.neg_(), moved, modes)  # type: ignore


def halves_at_start(
    cores: Tensor,  # flat
    start: Tensor,  # flat
    starts_halves: Sequence[Halves],  # of each network
    shapes: tuple[torch.Size, ...],
) -> tuple[Tensor, Tensor]:  # each with a leading axis of networks
    """The halves of the cores; with the bits of the start's own where no core has moved."""
    halves = (torch.stack(half).to(cores) for half in zip(*starts_halves))
    return _AtStart.apply(*sorted_halves(cores, shapes), *halves, (cores != start).any(1))  # type: ignore


class _AtStart(torch.autograd.Function):
    """The first two, but the others where nothing has moved: batched products may round otherwise."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, start_left: Tensor, start_right: Tensor, moved: Tensor
    ) -> tuple[Tensor, Tensor]:
        moved = moved.view(-1, 1, 1, 1)
        return torch.where(moved, left, start_left), torch.where(moved, right, start_right)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *grads, None, None, None


class _SideBySide(torch.autograd.Function):
    """Two chains sorted to halves; and, along the bond beside constant ones, times a factor, those of the difference.

    A half is a view of the difference's, so that it is not there twice; but for the smaller one, which has the factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        more_left: Tensor,
        more_right: Tensor,
        factor: Tensor,  # (networks,)
        modes: Sequence[_Modes],
    ) -> tuple[Tensor, ...]:
        ctx.modes, bond = modes, left.shape[2]
        chains, more = (left, right), (more_left, more_right)
        views = [(m.sort(chain), other.view(-1, *m.sorted)) for chain, other, m in zip(chains, more, modes)]
        both_left = torch.cat(views[0], -1).view(*more_left.shape[:3], 2 * bond)
        both_right = torch.cat(views[1], 1).view(len(right), 2 * bond, *more_right.shape[2:])
        halves = both_left[..., :bond], both_right[:, :bond]
        factor = factor.view(-1, 1, 1, 1)
        if left.numel() < right.numel():
            both_left = both_left * factor
        else:
            both_right = both_right * factor
        ctx.mark_non_differentiable(both_left, both_right)
        ctx.set_materialize_grads(False)
        return *halves, both_left, both_right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        left, right = (None if grad is None else m.join_again(grad) for grad, m in zip(grads, ctx.modes))
        left = None if left is None else left.flatten(1, -2)
        return left, None if right is None else right.flatten(2), None, None, None, None


class _Modes(NamedTuple):
    """How the modes of a half lie, axis by axis, and the orders of axes that lead from one form to the other."""

    joined: tuple[int, ...]  # i_1 j_1 i_2 j_2 …, and the bond where it stands
    order: tuple[int, ...]
    sorted: tuple[int, ...]  # i_1 i_2 … j_1 j_2 …
    order_back: tuple[int, ...]
    sizes: tuple[int, ...]  # (out, in), and the bond

    def sort(self, chain: Tensor) -> Tensor:  # (networks, *sorted), a view
        """A chain with its outputs before its inputs."""
        return chain.view(-1, *self.joined).permute(0, *(1 + axis for axis in self.order))

    def join_again(self, half: Tensor) -> Tensor:  # (networks, *joined)
        """A half with its modes in the order of the cores."""
        return half.reshape(-1, *self.sorted).permute(0, *(1 + axis for axis in self.order_back)).contiguous()


class _Plan(NamedTuple):
    """How cores of some shapes are contracted; made once per shapes."""

    position: int  # the number of cores on the left of the bond at which they are cut
    left: _Modes
    right: _Modes


def _make_plan(shapes: tuple[torch.Size, ...]) -> _Plan:
    pairs = [shape[1] * shape[2] for shape in shapes]
    sizes = [(prod(pairs[:k]) + prod(pairs[k:])) * shapes[k][0] for k in range(1, len(shapes))]
    position = 1 + sizes.index(min(sizes))  # where the two halves have the fewest elements
    bond = shapes[position][0]
    return _Plan(position, _modes(shapes[:position], (), (bond,)), _modes(shapes[position:], (bond,), ()))


def _modes(shapes: Sequence[torch.Size], before: tuple[int, ...], after: tuple[int, ...]) -> _Modes:
    outs, ins = tuple(shape[1] for shape in shapes), tuple(shape[2] for shape in shapes)
    joined = (*before, *(size for pair in zip(outs, ins) for size in pair), *after)
    first, last = len(before), len(before) + 2 * len(shapes)
    order = (*range(first), *range(first, last, 2), *range(first + 1, last, 2), *range(last, len(joined)))
    order_back = tuple(order.index(axis) for axis in range(len(order)))
    sizes = (*before, prod(outs), prod(ins), *after)
    return _Modes(joined, order, tuple(joined[axis] for axis in order), order_back, sizes)


_kept_plan = cache(_make_plan)


def _plan(shapes: tuple[torch.Size, ...]) -> _Plan:
    make = _make_plan if torch.compiler.is_compiling() else _kept_plan  # a compiler traces through a cache, and warns
    return make(shapes)


def contract_to_halves(cores: Sequence[Tensor]) -> Halves:
    """Those of one network. Differentiable."""
    left, right = sorted_halves(flat_cores(cores, 1), tuple(core.shape for core in cores))
    return Halves(left[0], right[0])


MPO = Network(contract_to_halves)
