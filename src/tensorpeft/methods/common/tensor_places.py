"""Where a weight stands in a tensor over many layers: its heads, its layer, its projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensorpeft.sites import Site


@dataclass(frozen=True)
class Place:
    """A site, and what its weight is made of.

    Args:
        site: the site.
        outer: the size of the side that has no heads.
        features: the size of a head, on the other side.
        heads: of each projection.
        projections: names of what it projects, several if it is fused.
        inner_is_out: whether the heads are on the output side.
        interleaved: as `Site.interleaved`.
    """

    site: Site
    outer: int
    features: int
    heads: tuple[int, ...]
    projections: tuple[str, ...]
    inner_is_out: bool = True
    interleaved: bool = False

    def as_one(self) -> Place:
        """The same with the heads of a fused projection in the order of its rows, as if it were one projection."""
        return replace(self, heads=(sum(self.heads),), projections=(_name_in_block(self.site),), interleaved=False)


def place_matrix(site: Site) -> Place:
    """Of any weight: its inputs are the outer side, its outputs one head."""
    return Place(site, site.in_, site.out, (1,), (_name_in_block(site),))


def place_heads(
    site: Site,  # in an attention block
    head_dim: int | None,  # None: the model's configuration says it
    config: str,  # the name of the configuration, for messages
    remedy: str,  # what needs no heads, likewise
) -> Place:
    """With its heads, a fused projection split.

    Raises:
        ValueError: its projections or its heads are unknown.
    """
    head_dim = head_dim or site.head_dim
    if not site.projections:
        raise ValueError(
            f"{site.name}: a projection ({site.out}, {site.in_}) inside an attention block whose name or row order "
            "is unknown for this model, so that its heads cannot be told apart. Target the query, key, value and "
            f"output layers if the model has them, exclude this one, or use {remedy}, which needs no heads."
        )
    if head_dim is None:
        raise ValueError(
            f"{site.name}: the model's configuration says neither head_dim nor hidden_size and "
            f"num_attention_heads. Pass head_dim to {config}."
        )
    heads = site.heads if site.is_fused and site.heads else (site.inner_dim // head_dim,)
    if sum(heads) * head_dim != site.inner_dim:
        raise ValueError(
            f"{site.name}: {site.inner_dim} features are not a whole number of heads of head_dim={head_dim}. "
            f"Pass the right head_dim to {config}."
        )
    return Place(site, site.model_dim, head_dim, heads, site.projections, site.inner_is_out, site.interleaved)


class Places:
    """The places of one tensor, in order: its layers are the blocks that they stand in."""

    def __init__(self, places: Sequence[Place]):
        self.places = places
        self.blocks = list(dict.fromkeys(place.site.block for place in places))
        self.projections = list(dict.fromkeys(name for place in places for name in place.projections))
        self._layers = {block: layer for layer, block in enumerate(self.blocks)}
        self._numbers = {name: number for number, name in enumerate(self.projections)}

    @property
    def num_heads(self) -> int:
        """Of the place with most."""
        return max(max(place.heads) for place in self.places)

    def slice_of(self, place: Place) -> dict[str, Any]:
        """What `networks.slices.AbstractSliceUpdate` takes to be the place's weight."""
        return {
            "layer": self._layers[place.site.block],
            "projections": [self._numbers[name] for name in place.projections],
            "heads": place.heads,
            "inner_is_out": place.inner_is_out,
            "interleaved": place.interleaved,
        }


def _name_in_block(site: Site) -> str:
    """Of one role in all layers; the weights of an MLP, or outside of the layers, by what they are called."""
    return site.name.removeprefix(f"{site.block}.") if site.block else site.name
