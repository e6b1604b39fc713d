"""The whole contract of an update at one weight: what it adds to the layer's output, and the matrix it is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from tensorpeft.networks.effective import Cut, effective_linear, fold
from tensorpeft.networks.low_rank import MATRIX_PRODUCT, Factors, low_rank_linear


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


class AbstractLowRankUpdate(AbstractWeightUpdate):
    """A LoRA with structured factors: two thin products beside the base weight's (`networks.low_rank`)."""

    @abstractmethod
    def factors(self) -> Factors:
        """The three factors, in the parameters' dtype. Differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        """`x downᵀ coreᵀ upᵀ`; under autocast in its dtype."""
        return low_rank_linear(x, None, None, [self.factors()])

    def cut(self) -> Cut:
        """The halves `up · core` and `down`."""
        return Cut(MATRIX_PRODUCT, self.factors())
