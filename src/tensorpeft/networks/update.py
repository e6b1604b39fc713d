"""The whole contract of an update at one weight: what it adds to the layer's output, and the matrix it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorpeft.networks.effective import Cut, Halves, Network, effective_linear, fold


class AbstractWeightUpdate(nn.Module, ABC):
    """ΔW of one weight (out, in), added to a frozen W0: `y = x W0ᵀ + update(x)`.

    Parameters are trained; buffers are saved beside them and frozen. Both are registered under plain names
    (`core_1`, not `cores.0`): PEFT takes the adapter's name out of a checkpoint key one level above the tensor.

    Args:
        shared: the module that owns the factors which this update shares with others of its adapter. Not a submodule
            of this one: its parameters are registered, saved and trained once, by whoever holds the updates.
    """

    shared: nn.Module | None

    def __init__(self, shared: nn.Module | None = None):
        super().__init__()
        object.__setattr__(self, "shared", shared)

    @abstractmethod
    def forward(
        self,
        x: Tensor,  # (*batch, in)
    ) -> Tensor:  # (*batch, out)
        """`x ΔWᵀ`, in the dtype of x."""

    def add_to(
        self,
        result: Tensor,  # (*batch, out): x W0ᵀ + b
        x: Tensor,  # (*batch, in)
    ) -> Tensor:  # (*batch, out)
        """`result + x ΔWᵀ`, in the dtype of the result."""
        return result + self(x).to(result.dtype)

    @abstractmethod
    def cut(self) -> Cut:
        """ΔW as a network that can be cut in two.

        A matrix product A B of rank r has the halves (out, 1, r) and (r, 1, in).
        """

    def weight(self) -> Tensor:  # (out, in)
        """ΔW: the matrix that `forward` multiplies by, by the plain formula. Differentiable."""
        network, cores, start = self.cut()
        update = fold(network.halves(cores))
        return update - fold(network.halves(start)) if start else update


class AbstractFusedUpdate(AbstractWeightUpdate):
    """An update of high rank: a layer adds it to the base weight and multiplies once (`networks.effective`)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x ΔWᵀ` through the fused map, for a base whose weight cannot be added to."""
        return effective_linear(x, None, None, [self.cut()])


class Factors(NamedTuple):
    """`ΔW = up · core · down` of rank r: what LoRA has, with a core between its two factors."""

    down: Tensor  # (r, in)
    core: Tensor  # (r,): a diagonal; or (r, r)
    up: Tensor  # (out, r)


class AbstractLowRankUpdate(AbstractWeightUpdate):
    """A LoRA with structured factors: two thin products, ΔW is never formed."""

    @abstractmethod
    def factors(self) -> Factors:
        """The three factors, in the parameters' dtype. Differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        """`x downᵀ coreᵀ upᵀ`; under autocast in its dtype."""
        hidden, up = self._project_down(x)
        return F.linear(hidden, up)

    def add_to(self, result: Tensor, x: Tensor) -> Tensor:
        """As `result + forward(x)`, the last product and the sum in one pass over the output."""
        hidden, up = self._project_down(x)
        if result.dtype != hidden.dtype or result.device != hidden.device:
            return result + F.linear(hidden, up).to(result)
        sum_ = torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), up.t())
        return sum_.view(result.shape)

    def _project_down(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, r), up (out, r)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        down, core, up = (factor.to(device=x.device, dtype=dtype) for factor in self.factors())
        hidden = F.linear(x, down)
        return (hidden * core if core.ndim == 1 else F.linear(hidden, core)), up

    def cut(self) -> Cut:
        """The halves `up · core` and `down`."""
        return Cut(MATRIX_PRODUCT, self.factors())


def _halves(factors: Sequence[Tensor]) -> Halves:
    down, core, up = factors
    left = up * core if core.ndim == 1 else up @ core
    return Halves(left.unsqueeze(1), down.unsqueeze(1))


def _pull_back(factors: Sequence[Tensor], gradient: Halves) -> list[Tensor]:
    _, core, up = factors
    left = gradient.left.squeeze(1)
    if core.ndim == 1:
        return [gradient.right.squeeze(1), (left * up).sum(0), left * core]
    return [gradient.right.squeeze(1), up.t() @ left, left @ core.t()]


MATRIX_PRODUCT = Network(_halves, _pull_back)
