"""A bottleneck behind a layer, `z + B relu(A z + a) + b`, its two matrices tensor trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tensorpeft.networks.tensor_train import contract, describe_trains
from tensorpeft.networks.update import AbstractOutputUpdate


class BottleneckUpdate(AbstractOutputUpdate):
    """What a bottleneck adapter adds to a layer's output.

    Args:
        down: the cores of Aᵀ (size, width), over the modes of the size and then those of the width.
        up: the cores of Bᵀ (width, size), over the modes of the width and then those of the size.
        width: features of the bottleneck.
        size: features of the layer's output.

    Source: LoRETTA (arXiv 2402.11417, adp); the bottleneck: Houlsby et al. (2019).
    """

    def __init__(self, down: Sequence[Tensor], up: Sequence[Tensor], width: int, size: int):
        super().__init__()
        self.width, self.size = width, size
        self.num_down, self.num_up = len(down), len(up)
        for side, cores in (("down", down), ("up", up)):
            for k, core in enumerate(cores, 1):
                self.register_parameter(f"{side}_{k}", nn.Parameter(core))
        self.down_bias = nn.Parameter(down[0].new_zeros(width))
        self.up_bias = nn.Parameter(up[0].new_zeros(size))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (width, size) and B (size, width). Differentiable."""
        down = contract([getattr(self, f"down_{k}") for k in range(1, self.num_down + 1)]).view(self.size, self.width)
        up = contract([getattr(self, f"up_{k}") for k in range(1, self.num_up + 1)]).view(self.width, self.size)
        return down.t(), up.t()

    def forward(self, z: Tensor) -> Tensor:
        """`B relu(A z + a) + b`."""
        down, up = self.matrices()
        hidden = F.relu(F.linear(z, down.to(z.dtype), self.down_bias.to(z.dtype)))
        return F.linear(hidden, up.to(z.dtype), self.up_bias.to(z.dtype))

    def tensor_name(self) -> str:
        """Two trains of its own for every layer, told by their modes."""
        return self.extra_repr()

    def extra_repr(self) -> str:
        """Modes, as in `A 8·12·8·8·8, B 8·8·8·12·8`."""
        return describe_trains(self, self.num_down, self.num_up)
