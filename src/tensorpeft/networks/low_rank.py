"""The linear map of a weight and its low-rank updates: `y = x W0ᵀ + Σ x downᵀ upᵀ + b`, two thin products each.

Nothing of a weight's size is formed. The thin products are added in place to the map's own output and, in backward, to
its own gradient of x: no pass over either beyond those of the base. Measured by `benchmarks/step_time.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorpeft.networks.cut import Halves, Network, plain_sum
from tensorpeft.networks.derivatives import (
    as_no_view,
    is_compiled_without_gradients,
    is_transformed,
    linear_gradients,
)
from tensorpeft.networks.dtypes import at_least_float32, product_dtype, without_autocast


class Factors(NamedTuple):
    """`ΔW = up · core · down`: what LoRA has, with a core between its two factors."""

    down: Tensor  # (r, in)
    core: Tensor  # (r,): a diagonal; or (r', r)
    up: Tensor  # (out, r')

    @property
    def rank(self) -> int:
        """Of the pair."""
        return min(self.down.shape[-2], self.up.shape[-1])

    def pair(self) -> Pair:
        """The same of two factors, at the smaller of two ranks. Differentiable; all factors may have a leading axis."""
        down, core, up = self.in_one_dtype()
        if core.ndim < up.ndim:
            return Pair(down, up * core.unsqueeze(-2))
        if core.shape[-2] < core.shape[-1]:
            return Pair(core @ down, up)
        return Pair(down, up @ core)

    def in_one_dtype(self) -> Factors:
        """In the widest: frozen ones keep theirs, whatever the trained ones are cast to."""
        dtype = reduce(torch.promote_types, [factor.dtype for factor in self])
        return Factors(*(factor.to(dtype) for factor in self))


class Pair(NamedTuple):
    """`ΔW = up · down` of rank r."""

    down: Tensor  # (r, in)
    up: Tensor  # (out, r)


def pairs_of(
    factors: Factors,  # the core with a leading axis of weights
    dtype: torch.dtype | None,  # that the pairs are wanted in; None: the factors'
) -> list[tuple[Tensor, ...]]:  # a pair for each weight
    """The pairs of weights that differ in their cores alone: what is equal is one tensor, the rest is one product."""
    down, cores, up = factors.in_one_dtype()
    count = len(cores)
    if cores.ndim == 2:
        downs, ups = down.to(dtype or down.dtype).expand(count, -1, -1), (up * cores.unsqueeze(1)).to(dtype or up.dtype)
    elif cores.shape[1] < cores.shape[2]:
        downs = (cores.flatten(0, 1) @ down).to(dtype or down.dtype).view(count, -1, down.shape[1])
        ups = up.to(dtype or up.dtype).expand(count, -1, -1)
    else:
        side_by_side = cores.transpose(0, 1).flatten(1)  # (r', weights · r)
        downs = down.to(dtype or down.dtype).expand(count, -1, -1)
        ups = (up @ side_by_side).to(dtype or up.dtype).view(len(up), count, -1).transpose(0, 1)
    return list(zip(downs.unbind(), ups.unbind()))


def low_rank_linear(
    x: Tensor,  # (*batch, in)
    weight: Tensor | None,  # (out, in); None: the updates alone
    bias: Tensor | None,  # (out,)
    pairs: Sequence[Pair],
) -> Tensor:  # (*batch, out)
    """`x (weight + Σ ΔW)ᵀ + bias` without forming a ΔW, differentiable in everything, any number of times.

    All products run in the dtype of x, under autocast in autocast's: factors are cast to it, which are small.
    Where every ΔW is exactly zero, the result is `F.linear(x, weight, bias)` bit for bit.
    """
    x = x.to(product_dtype(x))
    tensors = [factor.to(device=x.device, dtype=x.dtype) for pair in pairs for factor in pair]
    if is_transformed() or is_compiled_without_gradients():
        return _plain_linear(bias, x, weight, *tensors)
    return _LowRankLinear.apply(x, weight, bias, *tensors)  # type: ignore[no-any-return]


def low_rank_rows(
    x: Tensor,  # (rows, *, in)
    factors: Factors,  # with a leading axis of adapters
    adapters: Tensor,  # (rows,): the adapter of each row
) -> Tensor:  # (rows, *, out)
    """`x ΔWᵀ` with another ΔW for every row, in batched products."""
    down, core, up = (factor.to(device=x.device, dtype=x.dtype)[adapters] for factor in factors)
    hidden = x.reshape(len(x), -1, x.shape[-1]) @ down.mT
    hidden = hidden * core[:, None] if core.ndim == 2 else hidden @ core.mT
    return (hidden @ up.mT).view(*x.shape[:-1], up.shape[-2])


def _plain_linear(bias: Tensor | None, x: Tensor, weight: Tensor | None, *tensors: Tensor) -> Tensor:
    """`low_rank_linear` of plain operations."""
    with without_autocast(x.device):
        return plain_sum(x, weight, bias, [F.linear(F.linear(x, down), up) for down, up in _pairs(tensors)])


class _LowRankLinear(torch.autograd.Function):
    """Saves x, the frozen weight, the factors and, of every update, x in its r dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        with without_autocast(x.device):
            result = _base(x, weight, bias, tensors[1].shape[0])
            sums = result.view(-1, result.shape[-1])
            projected: list[Tensor] = []
            for down, up in _pairs(tensors):
                projected.append(rows @ down.t())
                sums.addmm_(projected[-1], up.t())
        ctx.save_for_backward(x, weight, *tensors, *projected)
        return as_no_view(result)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_output,) = grad_outputs
        x, weight, *saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *needs_tensors = ctx.needs_input_grad
        tensors, projected = saved[: len(needs_tensors)], saved[len(needs_tensors) :]
        if torch.is_grad_enabled():  # create_graph=True
            wanted = (needs_x, needs_weight, needs_bias, *needs_tensors)
            plain = partial(_plain_linear, None)
            *firsts, given = linear_gradients(plain, (x, weight, *tensors), wanted, grad_output)
            return *firsts, *given
        rows_x, rows_y = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        with without_autocast(x.device):
            grad_x = None
            if needs_x:
                grad_x = torch.zeros_like(rows_x) if weight is None else rows_y @ weight.to(rows_y.dtype)
            grads: list[Tensor | None] = []
            for k, ((down, up), hidden) in enumerate(zip(_pairs(tensors), projected)):
                needs_down, needs_up = needs_tensors[2 * k : 2 * k + 2]
                grad_hidden = rows_y @ up
                if grad_x is not None:
                    grad_x.addmm_(grad_hidden, down)
                grads.append(grad_hidden.t() @ rows_x if needs_down else None)
                grads.append(rows_y.t() @ hidden if needs_up else None)
            grad_weight = rows_y.t() @ rows_x if needs_weight else None
            grad_bias = rows_y.sum(0) if needs_bias else None
        return None if grad_x is None else grad_x.view_as(x), grad_weight, grad_bias, *grads


def _base(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: int) -> Tensor:  # (*batch, out), contiguous
    if weight is None:
        return x.new_zeros(*x.shape[:-1], out)
    # Of x as it lies: of the same numbers in other strides torch's product may have other bits.
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).contiguous()


def _pairs(tensors: Sequence[Tensor]) -> list[Pair]:
    return [Pair(*tensors[k : k + 2]) for k in range(0, len(tensors), 2)]


def _halves(factors: Sequence[Tensor]) -> Halves:
    down, up = Factors(*map(at_least_float32, factors)).pair()
    return Halves(up.unsqueeze(1), down.unsqueeze(1))


def _halves_of_pair(pair: Sequence[Tensor]) -> Halves:
    down, up = map(at_least_float32, pair)
    return Halves(up.unsqueeze(1), down.unsqueeze(1))


MATRIX_PRODUCT = Network(_halves)
PAIR_PRODUCT = Network(_halves_of_pair)
