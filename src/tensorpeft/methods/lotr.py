"""LoTR (arXiv 2402.01376): the updates of all layers as one Tucker2 tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt

from torch import nn

from tensorpeft.methods.common.frozen_frames import FreezableFramesConfig
from tensorpeft.networks.group import join
from tensorpeft.networks.sketch import Gradient
from tensorpeft.networks.tucker import TuckerFactors, TuckerUpdate, set_shared_frames
from tensorpeft.plugin.config import Bases, check_is_bool, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site, group_by_tensor, shape_name


@register("lotr")
@dataclass
class LotrConfig(FreezableFramesConfig):
    """`ΔW_l = (alpha / r) · U G_l Vᵀ`: U (out, r) and V (in, r) are shared by all weights of one shape (and tower).

    Each weight has a core G_l (r, r) of its own; weights of another shape form another tensor. Query and value of
    LLaMA-2-7B at r = 4 have 33,792 parameters; LoRA's have 2,097,152.

    Args:
        r: rank of both modes.
        alpha: the updates are scaled by alpha / r.
        train: "all"; or "cores": U and V are frozen as they start, the paper's "extremely cheap" training. They are
            worth it where `initialize_from_gradients` has set them. Query and value of LLaMA-2-7B at r = 4 then have
            1,024 parameters.
        init_weights: True: the cores start at zero, so that every update does; U and V are normal with variance
            1 / size. False: the cores are normal too, which is *not* the identity.

    Raises:
        ValueError: a rank below 1, an alpha that is not positive, an unknown `train`.

    Source: LoTR, section 3; the variance of U and V is ours, the paper only says that they are normal.

    >>> LotrConfig(r=4, target_modules=["q_proj", "v_proj"]).r
    4
    """

    r: int = field(default=4, metadata={"help": "Rank of the shared factors."})
    alpha: float = field(default=16, metadata={"help": "The updates are scaled by alpha / r."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        check_is_bool("init_weights", self.init_weights)
        check_scale("alpha", self.alpha)

    def of_sum(self, others: Sequence[LotrConfig]) -> LotrConfig:
        """The ranks add up."""
        rank = self.r + sum(other.r for other in others)
        return replace(self, r=rank, alpha=rank, frames=None)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, TuckerUpdate]:
        """A weight of its shape's tensor per site. Reads no weight."""
        groups = group_by_tensor(sites, shape_name)
        sizes = {name: (len(group), group[0].out, group[0].in_) for name, group in groups.items()}
        shared = TuckerFactors(self.r, sizes, has_small_core=False, trains_frames=self.train == "all")
        for name, (_, out, in_) in sizes.items():
            nn.init.normal_(getattr(shared, f"{name}_U"), std=1 / sqrt(out))
            nn.init.normal_(getattr(shared, f"{name}_V"), std=1 / sqrt(in_))
            if not self.init_weights:
                nn.init.normal_(getattr(shared, f"{name}_G"))
        updates = {
            site.name: TuckerUpdate(shared, name, index, self.alpha / self.r)
            for name, group in groups.items()
            for index, site in enumerate(group)
        }
        return join(updates)

    def frame_rank(self, sites: Mapping[str, tuple[int, int]]) -> int:
        """That of U and V."""
        return self.r

    def set_frames(self, updates: Mapping[str, TuckerUpdate], gradients: Mapping[str, Gradient]) -> None:
        """U and V of each tensor where the gradients of all its weights have most energy together."""
        set_shared_frames(updates, gradients)
