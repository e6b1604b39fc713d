"""Updates of a convolution's weight, read as a matrix (out, in / groups · kernel), and applied as two convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorpeft.networks.dtypes import without_autocast
from tensorpeft.networks.low_rank import Factors
from tensorpeft.networks.update import AbstractFactoredUpdate

_torch: Any = torch  # `tensordot` has no type for lists of axes
_CONVOLVE: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)


def low_rank_convolution(
    x: Tensor,  # (*batch, in, *sizes); batch: one dimension, or none
    factors: Factors,  # down (r, in / groups · kernel)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # (*batch, out, *sizes)
    """The convolution with the weight `up · core · down`: into r channels by the kernel, out of them by a 1 x 1 one.

    In the dtype of x; under autocast in its. A grouped convolution has the same r kernels for every group.
    """
    down, core, up = (factor.to(device=x.device, dtype=x.dtype) for factor in factors)
    convolve = _CONVOLVE[len(kernel) - 1]
    kernels = down.view(len(down), -1, *kernel).repeat(groups, *(1 for _ in range(len(kernel) + 1)))
    hidden = convolve(x, kernels, None, stride, padding, dilation, groups)
    up = up * core if core.ndim == 1 else up @ core
    return convolve(hidden, up.view(*up.shape, *(1 for _ in kernel)), groups=groups)


class TuckerConvolutionUpdate(AbstractFactoredUpdate):
    """The Tucker decomposition of a convolution's update, a mode for each of its axes.

    `ΔW[o, i, x, y] = scale · Σ U[o, p] G[p, q, a, b] V[i, q] K1[x, a] K2[y, b]`, for one, two or three kernel axes.
    Made without values worth keeping but a zero G.

    Args:
        out: output channels.
        in_: input channels of a group.
        kernel: sizes of its axes.
        rank: r of the channels' modes; a kernel's mode has rank min(r, its size).
        scale: s.
        geometry: `stride`, `padding`, `dilation` and `groups` of the layer.
        border: what to pad x with first, as `torch.nn.functional.pad` takes it, and its mode; None: nothing.

    Source: FLoRA (arXiv 2405.14739), section 3.2.
    """

    def __init__(
        self,
        out: int,
        in_: int,
        kernel: Sequence[int],
        rank: int,
        scale: float,
        geometry: dict[str, Any],
        border: tuple[Sequence[int], Literal["reflect", "replicate", "circular"]] | None = None,
    ):
        super().__init__()
        self.kernel = tuple(kernel)
        self.scale = scale
        self.geometry = geometry
        self.border = border
        ranks = [min(rank, size) for size in kernel]
        self.U = nn.Parameter(torch.zeros(out, rank))
        self.V = nn.Parameter(torch.zeros(in_, rank))
        self.G = nn.Parameter(torch.zeros(rank, rank, *ranks))
        for k, (size, kernel_rank) in enumerate(zip(kernel, ranks), 1):
            self.register_parameter(f"K{k}", nn.Parameter(torch.zeros(size, kernel_rank)))

    def kernel_factors(self) -> list[Tensor]:
        """K1, K2, …, one per axis of the kernel."""
        return [getattr(self, f"K{k}") for k in range(1, len(self.kernel) + 1)]

    def factors(self) -> Factors:
        """`down`: the core times all factors but U; the scale; and U."""
        down: Tensor = self.G
        with without_autocast(down.device):
            for factor in (self.V, *self.kernel_factors()):
                down = _torch.tensordot(down, factor, dims=([1], [1]))  # its axis goes last
        return Factors(down.flatten(1), self.U.new_full((len(down),), self.scale), self.U)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with ΔW, without forming it."""
        if self.border is not None:
            padding, mode = self.border
            x = F.pad(x, list(padding), mode=mode)
        return low_rank_convolution(x, self.factors(), self.kernel, **self.geometry)

    def tensor_name(self) -> str:
        """A tensor of its own for every weight, told by its modes."""
        return self.extra_repr()

    def extra_repr(self) -> str:
        """Modes and ranks."""
        modes = [f"U {len(self.U)}", f"V {len(self.V)}", *(f"K {size}" for size in self.kernel)]
        return f"{' · '.join(modes)}, r {'·'.join(map(str, self.G.shape))}"
