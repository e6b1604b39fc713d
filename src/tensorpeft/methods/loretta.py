"""LoRETTA (arXiv 2402.11417), the reparameterising form: a LoRA whose factors are tensor trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

from torch import Tensor

from tensorpeft.modes import modes_near_8
from tensorpeft.networks.group import join
from tensorpeft.networks.sketch import Gradient
from tensorpeft.networks.tensor_train import TensorTrainUpdate, random_train
from tensorpeft.plugin.config import Bases, FramedConfig, check_is_bool, check_modes, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site


@register("loretta")
@dataclass
class LorettaConfig(FramedConfig):
    """`ΔW = (alpha / r) · B A`: A (r, in) and B (out, r) are each a tensor train over the modes of all its entries.

    A 768 x 768 weight at the defaults has 1,160 parameters: twice the train over 8·8·12·8 = 8 · 768 with bonds of 5.
    LoRA of rank 8 has 12,288.

    Args:
        r: rank of the update.
        tt_rank: bond dimension of both trains.
        alpha: the updates are scaled by alpha / r.
        modes: {r · size: [mode, …]} for factors to be split otherwise than into modes near 8; at least 2 modes.
        init_weights: True: A's cores are Gaussian with the variance that LoRA's A has, B's last core is zero, so that
            the update is. False: B's last core is Gaussian too, which is *not* the identity.

    Raises:
        ValueError: a rank or bond below 1, an alpha that is not positive, modes that are not at least 2 whole numbers
            with the product that they are for.

    Source: LoRETTA, section 3.3 (rep). The paper's code starts away from the pretrained model; the start here, the
    variances and the modes of sizes that its tables lack are ours.

    >>> LorettaConfig(target_modules=["q_proj", "v_proj"]).tt_rank
    5
    """

    r: int = field(default=8, metadata={"help": "Rank of the update."})
    tt_rank: int = field(default=5, metadata={"help": "Bond dimension of the trains."})
    alpha: float = field(default=16, metadata={"help": "The updates are scaled by alpha / r."})
    modes: dict[int, list[int]] | None = field(default=None, metadata={"help": "{r · size: modes} that override ours."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        check_rank("tt_rank", self.tt_rank)
        check_is_bool("init_weights", self.init_weights)
        check_scale("alpha", self.alpha)
        self.modes = check_modes(self.modes)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, TensorTrainUpdate]:
        """Two trains per site. Reads no weight."""
        return join({site.name: self._build_one(site) for site in sites})

    def frame_rank(self, sites: Mapping[str, tuple[int, int]]) -> int:
        """That of the update."""
        return self.r

    def set_frames(self, updates: Mapping[str, TensorTrainUpdate], gradients: Mapping[str, Gradient]) -> None:
        """Both trains where the weight's gradient has most energy, as far as their bonds can hold that."""
        for name, update in updates.items():
            update.set_frames(gradients[name])

    def _build_one(self, site: Site) -> TensorTrainUpdate:
        down = self._train(site.in_, std=1 / sqrt(3 * site.in_))  # the variance of LoRA's A
        up = self._train(site.out, std=1.0)
        # Of the product's scale only the last core's is at stake: a zero core learns at the pace of those before it.
        up[-1].mul_(0.0 if self.init_weights else 1 / sqrt(site.out))
        return TensorTrainUpdate(down, up, self.r, self.alpha / self.r)

    def _train(self, size: int, std: float) -> list[Tensor]:
        entries = self.r * size
        modes = (self.modes or {}).get(entries) or modes_near_8(entries, least=2)
        return random_train(modes, self.tt_rank, std)
