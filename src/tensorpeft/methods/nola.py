"""NOLA (ICLR 2024): a LoRA whose factors are combinations of frozen random bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

from torch import nn

from tensorpeft.networks.random_bases import RandomBases, RandomBasesUpdate
from tensorpeft.plugin.config import Bases, TensorConfig, check_is_bool, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site


@register("nola")
@dataclass
class NolaConfig(TensorConfig):
    """`ΔW = (alpha / r) · (Σ_i α_i A_i) (Σ_j β_j B_j)`: 2 · num_bases coefficients are trained per weight.

    The bases A_i (out, r) and B_j (r, in) are random and frozen. They come from the seed, are in memory once for all
    weights of one size, and in no checkpoint: an adapter of 224 weights with 64 bases has 28,672 parameters, whatever
    the model's width and the rank.

    Args:
        r: rank of the update.
        num_bases: k, on each side.
        seed: what the bases are made from (`networks.random_bases`); saved in adapter_config.json.
        alpha: the updates are scaled by alpha / r.
        init_weights: True: the α are zero, so that the update is, and the β are normal with variance 1 / k, so that
            Σ β_j B_j is as large as LoRA's A. False: the α are normal too, which is *not* the identity.

    Raises:
        ValueError: a rank or number of bases below 1, a seed that is not from 0 to 2**64 - 1, an alpha not positive.

    Source: NOLA (Koohpayegani et al., ICLR 2024), section 3.1; the start, the uniform distribution of the bases and
    their generator are ours.

    >>> NolaConfig(r=8, num_bases=64, seed=3, target_modules=["q_proj"]).seed
    3
    """

    r: int = field(default=8, metadata={"help": "Rank of the update."})
    num_bases: int = field(default=64, metadata={"help": "Random bases on each side."})
    seed: int = field(default=0, metadata={"help": "What the bases are made from."})
    alpha: float = field(default=16, metadata={"help": "The updates are scaled by alpha / r."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        check_rank("num_bases", self.num_bases)
        check_is_bool("init_weights", self.init_weights)
        check_scale("alpha", self.alpha)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed!r}: expected a whole number from 0 to 2**64 - 1.")

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, RandomBasesUpdate]:
        """Coefficients per site, and bases for all. Reads no weight.

        Raises:
            ValueError: a rank above every side of the weights: no file shows it, and the bases are as large.
        """
        largest = max((side for site in sites for side in (site.out, site.in_)), default=self.r)
        if self.r > largest:
            raise ValueError(
                f"r={self.r} is more than the {largest} features of the largest adapted weight: expected a rank of at "
                f"most {largest}."
            )
        shared = RandomBases(self.seed, self.num_bases, self.r, [(site.out, site.in_) for site in sites])
        updates = {}
        for site in sites:
            update = RandomBasesUpdate(shared, site.out, site.in_, self.alpha / self.r)
            nn.init.normal_(update.beta, std=1 / sqrt(self.num_bases))
            if not self.init_weights:
                nn.init.normal_(update.alpha, std=1 / sqrt(self.num_bases))
            updates[site.name] = update
        return updates
