"""FLoRA (arXiv 2405.14739): the update of every weight as a Tucker decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar, Literal

from torch import nn

from tensorpeft.methods.common.frozen_frames import FreezableFramesConfig
from tensorpeft.networks.convolution import TuckerConvolutionUpdate
from tensorpeft.networks.group import tensors_of
from tensorpeft.networks.sketch import Gradient, leading_part
from tensorpeft.networks.tucker import TuckerMatrixUpdate
from tensorpeft.plugin.config import Bases, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site


@register("flora")
@dataclass
class FloraConfig(FreezableFramesConfig):
    """`ΔW = (alpha / r) · U G Vᵀ` per weight: U (out, r), V (in, r) and the core G (r, r), all trained.

    Of a convolution (`nn.Conv1d`, `Conv2d`, `Conv3d`, named in `target_modules`) every axis of the kernel has a mode
    too, of rank min(r, its size).

    Args:
        r: rank of the modes of both sides' features (channels).
        alpha: the updates are scaled by alpha / r.
        train: "all"; or "cores": the factors are frozen as they start, and G alone is trained: r² numbers per weight.
            Worth it where `initialize_from_gradients` has set them. Not of convolutions.
        init_weights: True: the core starts at zero, so that the update does; the factors are uniform, ±1 / √size
            (Kaiming's). "svd": the core starts at zero between the leading singular vectors of the weight, with
            train="cores" LoRA-XS (arXiv 2405.17604) but for its scale. False: the core is normal, which is *not* the
            identity.

    Raises:
        ValueError: a rank below 1, an alpha that is not positive, an unknown `train`; when it meets a model, a
            convolution with train="cores".

    Source: FLoRA, section 3.2; the scale alpha / r is ours, the paper tunes a constant.

    >>> FloraConfig(r=8, target_modules=["q_proj"]).alpha
    16
    """

    adapts_convolutions: ClassVar[bool] = True

    r: int = field(default=8, metadata={"help": "Rank of the features' modes."})
    alpha: float = field(default=16, metadata={"help": "The updates are scaled by alpha / r."})
    init_weights: bool | Literal["svd"] = field(default=True, metadata={"help": 'True, "svd" or False.'})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        if self.init_weights not in (True, "svd", False):
            raise ValueError(f'init_weights={self.init_weights!r}: expected True, "svd" or False.')
        check_scale("alpha", self.alpha)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, TuckerMatrixUpdate | TuckerConvolutionUpdate]:
        """A Tucker decomposition per site. Reads a weight, one at a time, only for its singular vectors."""
        return {site.name: self._build_one(site, bases) for site in sites}

    def _build_one(self, site: Site, bases: Bases) -> TuckerMatrixUpdate | TuckerConvolutionUpdate:
        scale, form = self.alpha / self.r, site.convolution
        if form is None:
            update: Any = TuckerMatrixUpdate(site.out, site.in_, self.r, scale, self.train == "all")
        elif self.train == "cores":
            raise ValueError(
                f'{site.name}: train="cores" freezes the factors of linear layers; this is a convolution. Name it in '
                'exclude_modules, or pass train="all".'
            )
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
        for name, factor in tensors_of(update).items():
            if name != "G":
                nn.init.uniform_(factor, -1 / sqrt(len(factor)), 1 / sqrt(len(factor)))
            elif not self.init_weights:
                nn.init.normal_(factor)
        if self.init_weights == "svd":
            if form is not None:
                raise ValueError(
                    f'{site.name}: init_weights="svd" is for linear layers; this is a convolution. Name it in '
                    "exclude_modules, or pass init_weights=True."
                )
            weight = bases.read_weight(site)
            if not weight.is_meta:
                update.set_frames(leading_part(weight, self.r))
        return update

    def frame_rank(self, sites: Mapping[str, tuple[int, int]]) -> int:
        """That of U and V."""
        return self.r

    def set_frames(self, updates: Mapping[str, TuckerMatrixUpdate], gradients: Mapping[str, Gradient]) -> None:
        """U and V of each weight where its gradient has most energy."""
        for name, update in updates.items():
            update.set_frames(gradients[name])
