"""FLoRA (arXiv 2405.14739): the update of every weight as a Tucker decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar

from torch import nn

from tensorpeft.networks.convolution import TuckerConvolutionUpdate
from tensorpeft.networks.tucker import TuckerMatrixUpdate
from tensorpeft.plugin.config import Bases, TensorConfig, check_is_bool, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site


@register("flora")
@dataclass
class FloraConfig(TensorConfig):
    """`ΔW = (alpha / r) · U G Vᵀ` per weight: U (out, r), V (in, r) and the core G (r, r), all trained.

    Of a convolution (`nn.Conv1d`, `Conv2d`, `Conv3d`, named in `target_modules`) every axis of the kernel has a mode
    too, of rank min(r, its size).

    Args:
        r: rank of the modes of both sides' features (channels).
        alpha: the updates are scaled by alpha / r.
        init_weights: True: the core starts at zero, so that the update does; the factors are uniform, ±1 / √size
            (Kaiming's). False: the core is normal, which is *not* the identity.

    Raises:
        ValueError: a rank below 1, an alpha that is not positive.

    Source: FLoRA, section 3.2; the scale alpha / r is ours, the paper tunes a constant.

    >>> FloraConfig(r=8, target_modules=["q_proj"]).alpha
    16
    """

    adapts_convolutions: ClassVar[bool] = True

    r: int = field(default=8, metadata={"help": "Rank of the features' modes."})
    alpha: float = field(default=16, metadata={"help": "The updates are scaled by alpha / r."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        check_is_bool("init_weights", self.init_weights)
        check_scale("alpha", self.alpha)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, TuckerMatrixUpdate | TuckerConvolutionUpdate]:
        """A Tucker decomposition per site. Reads no weight."""
        return {site.name: self._build_one(site) for site in sites}

    def _build_one(self, site: Site) -> TuckerMatrixUpdate | TuckerConvolutionUpdate:
        scale, form = self.alpha / self.r, site.convolution
        if form is None:
            update: Any = TuckerMatrixUpdate(site.out, site.in_, self.r, scale)
        else:
            update = TuckerConvolutionUpdate(
                site.out,
                site.in_ // form.groups,
                form.kernel,
                self.r,
                scale,
                {"stride": form.stride, "padding": form.padding, "dilation": form.dilation, "groups": form.groups},
                form.border,
            )
        for name, factor in update.named_parameters():
            if name != "G":
                nn.init.uniform_(factor, -1 / sqrt(len(factor)), 1 / sqrt(len(factor)))
            elif not self.init_weights:
                nn.init.normal_(factor)
        return update
