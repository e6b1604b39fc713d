"""MetaTT (arXiv 2506.09105): one tensor train for the updates of all layers and projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Literal

import torch
from torch import nn

from tensorpeft.methods.common.tensor_places import Place, Places, place_heads, place_matrix
from tensorpeft.networks.group import join
from tensorpeft.networks.sketch import Gradient
from tensorpeft.networks.slices import set_slice_frames
from tensorpeft.networks.train_slices import TrainFactors, TrainSliceUpdate
from tensorpeft.plugin.config import Bases, FramedConfig, check_is_bool, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site, group_by_tensor, shape_name


@register("metatt")
@dataclass
class MetaTtConfig(FramedConfig):
    """`ΔW_{l,m}ᵀ = alpha · G1 G2[l] G3[m] G4` for layer l and projection m; 5d has one more core, for the heads.

    G1 (in, r) and G4 (r, out) meet the two sides of a weight, G2 (layers, r, r) and G3 (projections, r, r) stand
    between them. All weights of one shape (and tower) are one train: in a model whose keys and values are narrower than
    its queries, they are a second one.

    With 5d, `ΔW_{l,m}ᵀ[:, head h] = alpha · G1 G2[l] G3[m] G4[h] G5`, G4 (heads, r, r) and G5 (r, head dimension).
    All weights of attention of one hidden size and head dimension are one train, on its heads' side the outputs of
    query, key and value and the inputs of the attention's output, whose slice is transposed. Keys and values of
    grouped-query attention use the first slices of G4; a fused projection is split. Weights outside of attention have
    no heads: theirs are trains of 4d. Cross attention counts as layers of its own in both.

    Query and value of LLaMA-2-7B at r = 8 have 67,712 parameters (4d) or 38,016 (5d); LoRA's have 4,194,304.

    Args:
        r: rank of every bond.
        variant: "4d", of four cores, or "5d", with one more for the heads.
        alpha: what multiplies every update; it is not divided by r.
        bonds: of some trains, {name: [bond, ...]}, as `MetaTtSweep` leaves them. The others have r.
        head_dim: features of an attention head, for a model whose configuration does not say it.
        init_weights: True: the last core starts at zero, so that every update does; G1 is normal with variance 1 / in,
            the cores between are identities. False: all are random, which is *not* the identity.
            `tensorpeft.initialize_from_gradients` sets all but the last from a train of the gradients (TT-SVD).

    Raises:
        ValueError: a rank, bond or head dimension below 1, an unknown variant, an alpha that is not positive;
            when it meets a model, bonds of another number than the train has, and, with 5d, heads that are
            unknown.

    Source: MetaTT, 4D and 5D. The start, trains by shape, heads of grouped queries and of the output: ours.

    >>> MetaTtConfig(r=8, variant="5d", target_modules=["q_proj", "v_proj"]).alpha
    1.0
    """

    r: int = field(default=8, metadata={"help": "Rank of every bond."})
    variant: Literal["4d", "5d"] = field(default="4d", metadata={"help": '"4d", or "5d" with a core for the heads.'})
    alpha: float = field(default=1.0, metadata={"help": "What multiplies every update."})
    bonds: dict[str, list[int]] | None = field(default=None, metadata={"help": "Bonds of trains that have been cut."})
    head_dim: int | None = field(default=None, metadata={"help": "Features of a head, where the model does not say."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        check_is_bool("init_weights", self.init_weights)
        check_scale("alpha", self.alpha)
        if self.variant not in ("4d", "5d"):
            raise ValueError(f'variant={self.variant!r}: expected "4d", or "5d" with a core for the heads.')
        if self.head_dim is not None:
            check_rank("head_dim", self.head_dim)
        for name, bonds in (self.bonds or {}).items():
            if not isinstance(bonds, (list, tuple)) or not bonds:
                raise ValueError(f"bonds[{name!r}]={bonds!r}: expected a list of whole numbers of at least 1.")
            for bond in bonds:
                check_rank(f"bonds[{name!r}]", bond)

    def of_sum(self, others: Sequence[MetaTtConfig]) -> MetaTtConfig:
        """The bonds of each train add up."""
        configs = (self, *others)
        counts = {name: len(bonds) for config in configs for name, bonds in (config.bonds or {}).items()}
        bonds = {
            name: [sum(same) for same in zip(*(config._bonds(name, count) for config in configs))]
            for name, count in counts.items()
        }
        return replace(self, r=sum(config.r for config in configs), alpha=1.0, bonds=bonds or None)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, TrainSliceUpdate]:
        """A slice of its train per site. Reads no weight."""
        places = {site.name: self._place(site) for site in sites}
        groups = group_by_tensor(sites, lambda site: _train_name(places[site.name], self._has_heads(site)))
        trains = {name: Places([places[site.name] for site in group]) for name, group in groups.items()}
        sizes = {name: _modes(train, self._has_heads(train.places[0].site)) for name, train in trains.items()}
        shared = TrainFactors(sizes, {name: self._bonds(name, len(modes) - 1) for name, modes in sizes.items()})
        for name in sizes:
            self._start(shared.cores(name))
        updates = {
            place.site.name: TrainSliceUpdate(shared, name, **train.slice_of(place), scale=self.alpha)
            for name, train in trains.items()
            for place in train.places
        }
        return join(updates)

    def frame_rank(self, sites: Mapping[str, tuple[int, int]]) -> int:
        """The largest bond."""
        return max([self.r, *(bond for bonds in (self.bonds or {}).values() for bond in bonds)])

    def set_frames(self, updates: Mapping[str, TrainSliceUpdate], gradients: Mapping[str, Gradient]) -> None:
        """All cores but the last from a train of the gradients of all its weights."""
        set_slice_frames(updates, gradients)

    def _has_heads(self, site: Site) -> bool:
        return self.variant == "5d" and site.kind == "attention"

    def _place(self, site: Site) -> Place:
        if self._has_heads(site):
            return place_heads(site, self.head_dim, type(self).__name__, 'variant="4d"')
        return place_matrix(site)

    def _bonds(self, name: str, count: int) -> list[int]:
        bonds = list((self.bonds or {}).get(name, [self.r] * count))
        if len(bonds) != count:
            raise ValueError(
                f"bonds[{name!r}]={bonds}: expected {count}, one between each two of this train's {count + 1} cores. "
                "Were they cut with another variant? Leave them out to give every bond r."
            )
        return bonds

    def _start(self, cores: Sequence[nn.Parameter]) -> None:
        first, *inner, last = cores
        nn.init.normal_(first, std=1 / sqrt(len(first)))
        for core in inner:
            if self.init_weights:
                with torch.no_grad():
                    core.copy_(torch.eye(*core.shape[1:]).expand_as(core))
            else:
                nn.init.normal_(core, std=1 / sqrt(core.shape[1]))
        if not self.init_weights:
            nn.init.normal_(last, std=1 / sqrt(len(last)))


def _train_name(place: Place, has_heads: bool) -> str:
    return f"heads_{place.outer}x{place.features}" if has_heads else shape_name(place.site)


def _modes(train: Places, has_heads: bool) -> list[int]:
    first = train.places[0]
    heads = [train.num_heads] if has_heads else []
    return [first.outer, len(train.blocks), len(train.projections), *heads, first.features]
