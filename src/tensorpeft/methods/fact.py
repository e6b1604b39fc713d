"""FacT (arXiv 2212.03145): the updates of all weights as a tensor train or a Tucker3 tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Literal

from torch import nn

from tensorpeft.methods.common.frozen_frames import FreezableFramesConfig
from tensorpeft.networks.group import join, tensors_of
from tensorpeft.networks.sketch import Gradient
from tensorpeft.networks.tucker import TuckerFactors, TuckerUpdate, set_shared_frames
from tensorpeft.plugin.config import Bases, check_is_bool, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site, group_by_tensor, shape_name


@register("fact")
@dataclass
class FactConfig(FreezableFramesConfig):
    """`ΔW_n = scale · U G_n Vᵀ`: U (out, r) and V (in, r) are shared by all weights of one shape (and tower).

    As a tensor train every weight has a core G_n (r, r) of its own. As a Tucker3 tensor the cores are slices of one,
    `G_n = Σ_k P[n, k] C[:, :, k]` with P (weights, r) and C (r, r, r), which is smaller where the weights outnumber r.
    Query and value of LLaMA-2-7B at r = 4 have 33,792 ("tt") or 33,088 ("tk") parameters.

    Args:
        r: rank of every mode.
        core: "tt", tensor train, or "tk", Tucker3.
        scale: s, which multiplies every update.
        train: "all"; or "cores": U and V are frozen as they start, which is worth it where `initialize_from_gradients`
            has set them.
        init_weights: True: V starts at zero, so that every update does; where it is frozen, G (C). False: nothing
            does, which is *not* the identity.

    Raises:
        ValueError: a rank below 1, an unknown core or `train`, a scale that is not positive.

    Source: FacT, section 3 (FacT-TT and FacT-TK). Its weights multiply from the right, ours are (out, in).

    >>> FactConfig(r=4, core="tk", target_modules=["q_proj", "v_proj"]).scale
    1.0
    """

    r: int = field(default=4, metadata={"help": "Rank of every mode."})
    core: Literal["tt", "tk"] = field(default="tt", metadata={"help": '"tt": tensor train, "tk": Tucker3.'})
    scale: float = field(default=1.0, metadata={"help": "What multiplies every update."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        check_is_bool("init_weights", self.init_weights)
        check_scale("scale", self.scale)
        if self.core not in ("tt", "tk"):
            raise ValueError(f'core={self.core!r}: expected "tt" (tensor train) or "tk" (Tucker3).')

    def of_sum(self, others: Sequence[FactConfig]) -> FactConfig:
        """The ranks add up."""
        return replace(self, r=self.r + sum(other.r for other in others), scale=1.0, frames=None)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, TuckerUpdate]:
        """A weight of its shape's tensor per site. Reads no weight."""
        groups = group_by_tensor(sites, shape_name)
        sizes = {name: (len(group), group[0].out, group[0].in_) for name, group in groups.items()}
        shared = TuckerFactors(self.r, sizes, has_small_core=self.core == "tk", trains_frames=self.train == "all")
        zero = "V" if self.train == "all" else "GC"
        for key, factor in tensors_of(shared).items():
            if self.init_weights and key[-1] in zero:
                continue
            # What a factor is multiplied with on its left is of size r, or the size of the weight's side.
            fan = self.r if key[-1] in "GPC" else len(factor)
            nn.init.normal_(factor, std=1 / sqrt(fan))
        updates = {
            site.name: TuckerUpdate(shared, name, index, self.scale)
            for name, group in groups.items()
            for index, site in enumerate(group)
        }
        return join(updates)

    def frame_rank(self, sites: Mapping[str, tuple[int, int]]) -> int:
        """That of U and V."""
        return self.r

    def set_frames(self, updates: Mapping[str, TuckerUpdate], gradients: Mapping[str, Gradient]) -> None:
        """U and V of each tensor where the gradients of all its weights have most energy together; G (C) is zero."""
        set_shared_frames(updates, gradients)
