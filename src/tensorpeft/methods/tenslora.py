"""TensLoRA (arXiv 2509.19391): the updates stacked into Tucker or CP tensors, in one of seven arrangements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, get_args

import torch
from torch import nn

from tensorpeft.methods.common.tensor_places import Place, Places, place_heads, place_matrix
from tensorpeft.networks.cp import CpFactors, CpUpdate
from tensorpeft.networks.group import join
from tensorpeft.networks.sketch import Gradient
from tensorpeft.networks.slices import AbstractSliceUpdate, set_slice_frames
from tensorpeft.networks.tucker_slices import TuckerSliceFactors, TuckerSliceUpdate
from tensorpeft.plugin.config import LARGEST_RANK, Bases, FramedConfig, check_is_bool, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site, group_by_tensor, shape_name

Arrangement = Literal["Att", "QKV", "Depth", "Att_QKV", "Att_Depth", "QKV_Depth", "Att_QKV_Depth"]


@register("tenslora")
@dataclass
class TensLoraConfig(FramedConfig):
    """`ΔW_{l,m}ᵀ = scale · U1 (G ×3 U3[m] ×4 U4[l]) U2ᵀ` for projection m and layer l: a Tucker tensor (`QKV_Depth`).

    The arrangement says what is stacked: "QKV", the projections of a layer; "Depth", the layers; "Att", the heads of a
    projection, whose U2 then is that of a head's features and of the heads. What it does not name has tensors of its
    own: "Depth" is one for every projection, "Att" one for every weight.

    Weights of another shape (or tower) are another tensor, as keys and values are where they are narrower than queries.
    A fused projection is one of as many heads as all its parts have. With heads, the attention's output has them on its
    inputs, and is read transposed; weights outside of attention have none, and leave that mode out.

    Query, key and value of RoBERTa-base at r = 8 have 16,504 parameters; LoRA's have 442,368.

    Args:
        r: rank of every mode; or one for each, in the order inputs, outputs (features of a head), heads, projections,
            layers, as far as the arrangement has them. May exceed a mode's size.
        arrangement: what is stacked.
        decomposition: "tucker"; or "cp", whose core is the identity, with one rank.
        scale: what multiplies every update.
        head_dim: features of an attention head, for a model whose configuration does not say it.
        init_weights: True: the core (of "cp", the first factor) starts at zero, so that every update does. False: it is
            random, which is *not* the identity. Tucker's factors have orthonormal columns, or rows where r is larger
            than the mode. `tensorpeft.initialize_from_gradients` sets them from the gradients (HOOI; "cp": by least
            squares).

    Raises:
        ValueError: a rank or head dimension below 1, ranks of another number than modes, or several with "cp", an
            unknown arrangement or decomposition, a scale that is not positive; when it meets a model, with "Att", heads
            that are unknown.

    Source: TensLoRA and its code; the head is the slowest part of an output's index here, as in the model. Shapes of
    grouped queries, fused projections, output and MLP: ours.

    >>> TensLoraConfig(r=[8, 8, 3, 4], target_modules=["q_proj", "k_proj", "v_proj"]).arrangement
    'QKV_Depth'
    """

    r: int | list[int] = field(default=4, metadata={"help": "Rank of every mode, or one for each."})
    arrangement: Arrangement = field(default="QKV_Depth", metadata={"help": "What is stacked into one tensor."})
    decomposition: Literal["tucker", "cp"] = field(default="tucker", metadata={"help": '"tucker" or "cp".'})
    scale: float = field(default=1.0, metadata={"help": "What multiplies every update."})
    head_dim: int | None = field(default=None, metadata={"help": "Features of a head, where the model does not say."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        if isinstance(self.r, tuple):
            self.r = list(self.r)
        super().__post_init__()
        check_is_bool("init_weights", self.init_weights)
        check_scale("scale", self.scale)
        if self.arrangement not in get_args(Arrangement):
            raise ValueError(f"arrangement={self.arrangement!r}: expected one of {', '.join(get_args(Arrangement))}.")
        if self.decomposition not in ("tucker", "cp"):
            raise ValueError(f'decomposition={self.decomposition!r}: expected "tucker" or "cp".')
        if self.head_dim is not None:
            check_rank("head_dim", self.head_dim)
        for rank in self.r if isinstance(self.r, list) else [self.r]:
            check_rank("r", rank)
        if isinstance(self.r, list) and self.decomposition == "cp":
            raise ValueError(f'r={self.r}: decomposition="cp" has one rank for all modes, expected a whole number.')
        if isinstance(self.r, list) and len(self.r) != (count := 2 + len(self._stacked())):
            raise ValueError(
                f"r={self.r}: expected a whole number, or {count} of them for inputs, outputs and what "
                f"arrangement={self.arrangement!r} names (heads, projections, layers)."
            )
        if self.decomposition == "tucker" and (size := prod(self._ranks())) > LARGEST_RANK**2:
            raise ValueError(f"r={self.r}: the core would have {size} entries. Pass smaller ranks, such as 4.")

    def of_sum(self, others: Sequence[TensLoraConfig]) -> TensLoraConfig:
        """The ranks of each mode add up."""
        configs = (self, *others)
        if self.decomposition == "cp":
            return replace(self, r=sum(config.r for config in configs if isinstance(config.r, int)), scale=1.0)
        return replace(self, r=[sum(ranks) for ranks in zip(*(config._ranks() for config in configs))], scale=1.0)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, AbstractSliceUpdate]:
        """A slice of its tensor per site. Reads no weight."""
        places = {site.name: self._place(site) for site in sites}
        groups = group_by_tensor(sites, lambda site: self._tensor_name(places[site.name]))
        tensors = {name: Places([places[site.name] for site in group]) for name, group in groups.items()}
        sizes = {name: self._modes(tensor) for name, tensor in tensors.items()}
        update_cls, shared = self._factors(sizes)
        updates: dict[str, AbstractSliceUpdate] = {
            place.site.name: update_cls(shared, name, **tensor.slice_of(place), scale=self.scale)
            for name, tensor in tensors.items()
            for place in tensor.places
        }
        return join(updates)

    def frame_rank(self, sites: Mapping[str, tuple[int, int]]) -> int:
        """That of the inputs or of the outputs, whichever is larger."""
        return self.r if isinstance(self.r, int) else max(self.r[:2])

    def set_frames(self, updates: Mapping[str, AbstractSliceUpdate], gradients: Mapping[str, Gradient]) -> None:
        """All factors (of "cp", but one) from the gradients of all weights of a tensor, mode by mode."""
        set_slice_frames(updates, gradients)

    def _stacked(self) -> list[str]:
        return [str(mode) for mode in self.arrangement.split("_")]

    def _ranks(self) -> list[int]:
        """Of the inputs, the outputs and what is stacked."""
        return self.r if isinstance(self.r, list) else [self.r] * (2 + len(self._stacked()))

    def _has_heads(self, site: Site) -> bool:
        return "Att" in self._stacked() and site.kind == "attention"

    def _place(self, site: Site) -> Place:
        if not self._has_heads(site):
            return place_matrix(site)
        return place_heads(site, self.head_dim, type(self).__name__, 'an arrangement without "Att"').as_one()

    def _tensor_name(self, place: Place) -> str:
        heads = f"heads_{place.outer}x{place.heads[0]}x{place.features}"
        own = [heads if self._has_heads(place.site) else shape_name(place.site)]
        own += [] if "QKV" in self._stacked() else [place.projections[0]]
        own += [] if "Depth" in self._stacked() else [place.site.block]
        return "_".join(filter(None, own)).replace(".", "_")

    def _modes(self, tensor: Places) -> dict[str, int]:
        """{factor: size}, in the order of the paper's modes."""
        first = tensor.places[0]
        found = {"A": first.outer, "B": first.features}
        found |= {"C_H": first.heads[0]} if self._has_heads(first.site) else {}
        found |= {"C_M": len(tensor.projections)} if "QKV" in self._stacked() else {}
        return found | ({"C_L": len(tensor.blocks)} if "Depth" in self._stacked() else {})

    def _factors(
        self, sizes: dict[str, dict[str, int]]
    ) -> tuple[type[CpUpdate], CpFactors] | tuple[type[TuckerSliceUpdate], TuckerSliceFactors]:
        if isinstance(self.r, int) and self.decomposition == "cp":
            terms = CpFactors(self.r, sizes, is_zero=False)
            if self.init_weights:
                for name in sizes:
                    nn.init.zeros_(getattr(terms, f"{name}_A"))
            return CpUpdate, terms
        factors = {"Att": "C_H", "QKV": "C_M", "Depth": "C_L"}
        order = ["A", "B", *(factors[name] for name in self._stacked())]
        ranks = dict(zip(order, self._ranks()))
        shared = TuckerSliceFactors(
            sizes, {name: {factor: ranks[factor] for factor in modes} for name, modes in sizes.items()}
        )
        for key, tensor in shared.named_parameters():
            if not key.endswith("_G"):
                # In float32, whatever torch's default: LAPACK has no other QR.
                tensor.data.copy_(nn.init.orthogonal_(torch.empty_like(tensor, dtype=torch.float32)))
            elif not self.init_weights:
                nn.init.normal_(tensor)
        return TuckerSliceUpdate, shared
