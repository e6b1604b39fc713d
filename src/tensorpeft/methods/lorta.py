"""LoRTA (arXiv 2410.04060): one CP tensor for the updates of all layers, heads and projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tensorpeft.methods.common.tensor_places import Place, Places, place_heads
from tensorpeft.networks.cp import CpFactors, CpUpdate
from tensorpeft.networks.group import join
from tensorpeft.networks.sketch import Gradient
from tensorpeft.networks.slices import set_slice_frames
from tensorpeft.plugin.config import Bases, FramedConfig, check_is_bool, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site, group_by_tensor

_RANDOM = ("A", "C_H", "C_L", "C_M")  # factors that start at random


@register("lorta")
@dataclass
class LortaConfig(FramedConfig):
    """`ΔW_{l,m,h} = (alpha / r) · A diag(C_H[h] ∘ C_L[l] ∘ C_M[m]) Bᵀ` for layer l, projection m, head h.

    A (hidden size, r) meets the hidden states, B (head dimension, r) and C_H (heads, r) the heads: on the output side
    of query, key and value, on the input side of the attention's output. Keys and values of grouped-query attention
    use the first rows of C_H; a fused projection is split. Cross attention counts as layers of its own. The MLP's
    weights, which the paper leaves to the reader, form a second tensor with A (hidden size, r), B (intermediate
    size, r), C_L and C_M. In a model that is no transformer, a weight outside any list of layers is a tensor of
    its own. Query and value of LLaMA-2-7B at r = 4 have 17,160 parameters; LoRA's have 2,097,152.

    Args:
        r: rank of the CP tensor.
        alpha: the updates are scaled by alpha / r.
        head_dim: features of an attention head, for a model whose configuration does not say it.
        init_weights: True: B starts at zero, so that every update does. False: at random, which is *not* the identity.
        random_factors: factors that stay as they start, at random, among A, C_H, C_L and C_M: the "randomized factors"
            of the paper's section 5. They are saved with the others.

    Raises:
        ValueError: a rank below 1, an alpha or head dimension that is not positive, an unknown factor; when it meets a
            model, a target outside attention and MLP, a fused projection whose rows are in an unknown order, an unknown
            head dimension, layers of different sizes.

    Source: LoRTA, section 3, defaults of its section 4. Which side the heads are on, grouped queries and the MLP: ours.

    >>> LortaConfig(r=4, target_modules=["q_proj", "v_proj"]).alpha
    16
    """

    r: int = field(default=4, metadata={"help": "Rank of the CP tensor."})
    alpha: float = field(default=16, metadata={"help": "The updates are scaled by alpha / r."})
    head_dim: int | None = field(default=None, metadata={"help": "Features of a head, where the model does not say."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})
    random_factors: list[str] | None = field(default=None, metadata={"help": "Factors that stay as they start."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        if not {*(self.random_factors or ())} <= {*_RANDOM}:
            raise ValueError(
                f"random_factors={self.random_factors!r}: expected some of {', '.join(_RANDOM)}. B starts at zero and "
                "is trained."
            )
        check_rank("r", self.r)
        check_is_bool("init_weights", self.init_weights)
        check_scale("alpha", self.alpha)
        if self.head_dim is not None:
            check_rank("head_dim", self.head_dim)

    def of_sum(self, others: Sequence[LortaConfig]) -> LortaConfig:
        """The ranks add up."""
        rank = self.r + sum(other.r for other in others)
        return replace(self, r=rank, alpha=rank)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, CpUpdate]:
        """A slice of the attention's or the MLP's tensor per site. Reads no weight."""
        places = {site.name: self._place(site) for site in sites}
        groups = group_by_tensor(sites, _tensor_name)
        tensors = {name: _places([places[site.name] for site in group]) for name, group in groups.items()}
        modes = {name: _modes(tensor) for name, tensor in tensors.items()}
        shared = CpFactors(self.r, modes, self.init_weights, self.random_factors or ())
        updates = {
            place.site.name: CpUpdate(shared, name, **tensor.slice_of(place), scale=self.alpha / self.r)
            for name, tensor in tensors.items()
            for place in tensor.places
        }
        return join(updates)

    def frame_rank(self, sites: Mapping[str, tuple[int, int]]) -> int:
        """That of the tensor."""
        return self.r

    def set_frames(self, updates: Mapping[str, CpUpdate], gradients: Mapping[str, Gradient]) -> None:
        """A and the coefficients by a CP decomposition of the gradients of all weights of a tensor."""
        set_slice_frames(updates, gradients)

    def _place(self, site: Site) -> Place:
        """The site with its heads; an MLP's hidden units are one.

        Raises:
            ValueError: its block, its projections or its heads are unknown.
        """
        if site.kind is None:
            raise ValueError(
                f"{site.name}: LoRTA's tensor has a mode for the layers, but this weight is in no attention or MLP "
                "block of a list of layers. Narrow target_modules, or name it in exclude_modules."
            )
        if site.kind == "attention":
            return place_heads(site, self.head_dim, "LortaConfig", "LotrConfig")
        parts = len(site.projections)
        sides = site.model_dim, site.inner_dim // parts
        return Place(site, *sides, (1,) * parts, site.projections, site.inner_is_out, site.interleaved)


def _tensor_name(site: Site) -> str:
    """The name of the tensor that a weight belongs to. Without dots, as `group_by_tensor` says."""
    return site.name.replace(".", "_") if site.kind == "plain" else str(site.kind)


def _places(places: Sequence[Place]) -> Places:
    """The places of one kind.

    Raises:
        ValueError: they differ in a mode that they share.
    """
    first = places[0]
    for place in places:
        got, expected = (place.outer, place.features), (first.outer, first.features)
        if got != expected:
            raise ValueError(
                f"{place.site.name}: a hidden size and {'head' if place.site.kind == 'attention' else 'inner'} "
                f"dimension of {got}, but {first.site.name} has {expected}: one tensor needs layers of one size. "
                "Exclude the others (exclude_modules, layers_to_transform), or use LotrConfig, which makes one "
                "tensor per shape."
            )
    return Places(places)


def _modes(tensor: Places) -> dict[str, int]:
    """{factor: size}, as `CpFactors` takes it."""
    first = tensor.places[0]
    heads = {"C_H": tensor.num_heads} if first.site.kind == "attention" else {}
    modes = {"A": first.outer, "B": first.features, **heads}
    return {**modes, "C_L": len(tensor.blocks), "C_M": len(tensor.projections)}
