"""An update cut in two along a small bond: what those take who multiply by it. And the same by plain operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorpeft.networks.dtypes import without_autocast


class Halves(NamedTuple):
    """A network contracted to the two sides of one bond, of dimension r."""

    left: Tensor  # (out_left, in_left, bond)
    right: Tensor  # (bond, out_right, in_right)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0] * self.right.shape[1], self.left.shape[1] * self.right.shape[2]

    def part(self, dim: int, start: int, stop: int) -> Halves:
        """Those of rows (dim 0) or columns (dim 1) [start, stop): whole slices of the left half."""
        slice_size = self.right.shape[1 + dim]
        return Halves(self.left.narrow(dim, start // slice_size, (stop - start) // slice_size), self.right)


class Network(NamedTuple):
    """How a kind of tensor network is cut in two. In float32 or float64, whatever the cores are in."""

    halves: Callable[[Sequence[Tensor]], Halves]  # cores -> halves; differentiable


class Ready(NamedTuple):
    """What was contracted for several weights together (`networks.group`)."""

    halves: Halves  # of the cores; they take the gradient
    difference: Halves | None = None  # to the start, where there is one


class Cut(NamedTuple):
    """An update `ΔW = fold(halves(cores)) − fold(halves(start))`, the second term where there is a start.

    `fold(left, right)[(a c), (b d)] = Σ_r left[a, b, r] right[r, c, d]` for output indices (a c) and input indices
    (b d), the first of each the slower one.
    """

    network: Network
    cores: tuple[Tensor, ...]
    start: tuple[Tensor, ...] = ()  # frozen, as many as the cores, or none
    ready: Ready | None = None  # what would be contracted, where it is there; of a start, or without


def fold(halves: Halves) -> Tensor:  # (out, in)
    """The matrix of two halves. Differentiable."""
    left, right = halves
    product = (left.flatten(0, 1) @ right.flatten(1)).view(*left.shape[:2], *right.shape[1:])
    return product.transpose(1, 2).reshape(left.shape[0] * right.shape[1], left.shape[1] * right.shape[2])


# Of each cut: its network, the number of its trained tensors, and of the constant ones behind them. No network: these
# are halves already, and those of the difference to a start.
Layout = Sequence[tuple[Network | None, int, int]]


def flattened(
    cuts: Sequence[Cut],
    device: torch.device,  # where they are multiplied: what layers share is on the device of one of them
) -> tuple[Layout, list[Tensor]]:
    """What autograd is given of the cuts."""
    layout: list[tuple[Network | None, int, int]] = []
    tensors: list[Tensor] = []
    for cut in cuts:
        network, trained, constant = cut.network, cut.cores, cut.start
        if cut.ready is not None and (not cut.start or cut.ready.difference is not None):
            network, trained, constant = None, cut.ready.halves, (cut.ready.difference if cut.start else None) or ()
        layout.append((network, len(trained), len(constant)))
        tensors += [tensor.to(device) for tensor in (*trained, *constant)]
    return layout, tensors


def plain_linear(layout: Layout, bias: Tensor | None, x: Tensor, weight: Tensor | None, *tensors: Tensor) -> Tensor:
    """`effective_linear` of plain operations, every update in a product of its own."""
    with without_autocast(x.device):
        updates = _plain_updates(layout, tensors)
        return plain_sum(x, weight, bias, [F.linear(x, update.to(x.dtype)) for update in updates])


def plain_weight(layout: Layout, weight: Tensor, *tensors: Tensor) -> Tensor:
    """`trained_weight` of plain operations."""
    with without_autocast(weight.device):
        return reduce(torch.add, [weight, *(update.to(weight.dtype) for update in _plain_updates(layout, tensors))])


def _plain_updates(layout: Layout, tensors: Sequence[Tensor]) -> list[Tensor]:
    rest, updates = iter(tensors), list[Tensor]()
    for network, *counts in layout:
        trained, constant = (tuple(islice(rest, count)) for count in counts)
        update = fold(Halves(*trained) if network is None else network.halves(trained))
        if constant and network is None:  # of the difference, which has the update's derivatives
            update = update + (fold(Halves(*constant)) - update).detach()
        elif constant and network is not None:
            update = update - fold(network.halves(constant)).detach()
        updates.append(update)
    return updates


def plain_sum(x: Tensor, weight: Tensor | None, bias: Tensor | None, added: Sequence[Tensor]) -> Tensor:
    """What is added to the base's product, and that, if there is a base."""
    if weight is not None:
        added = [F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), *added]
    return reduce(torch.add, added)
