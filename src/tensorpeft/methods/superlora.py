"""SuperLoRA (arXiv 2403.11887): the updates of a group of weights as one vector, folded to a low-rank tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import sqrt
from typing import ClassVar, Literal, get_args

from torch import nn

from tensorpeft.modes import fold_modes
from tensorpeft.networks.folded import FoldedFactors, FoldedUpdate, Form
from tensorpeft.plugin.config import Bases, TensorConfig, check_is_bool, check_num_modes, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site, group_by_tensor

Grouping = Literal["all", "layer", "type", "weight"]
# Sizes have no more factors that are worth it.
_LARGEST_ORDER, _LARGEST_NUM_FACTORS = 8, 8


@register("superlora")
@dataclass
class SuperLoraConfig(TensorConfig):
    """`vec(ΔW_1, ΔW_2, …) = (alpha / r) · vec(T_1 ⊗ … ⊗ T_K)` for every group of weights, T_k low-rank tensors.

    The entries of a group's weights, one after the other, are folded to a tensor with `tensor_order` nearly equal
    modes, with padding at the end where their number has no such factors. Query and value of ViT-base at order 3, one
    group: 216 x 256 x 256, 728 r + r³ parameters; LoRA's are 36,864 r.

    Args:
        r: rank of every mode, at most its size.
        tensor_order: M, the modes of the tensors: 2 for matrices `A_1 A_2ᵀ`, more for Tucker tensors with a core.
        num_factors: K, the tensors whose Kronecker product is taken.
        grouping: which weights form one vector: "all", those of one "layer", those of one "type" (names that differ in
            numbers only), or each "weight" alone.
        alpha: the updates are scaled by alpha / r.
        init_weights: True: the last factor of T_K starts at zero, so that every update does; the others are normal.
            False: that one, too, which is *not* the identity.

    Raises:
        ValueError: a rank, order or number of factors out of range, an unknown grouping, an alpha that is not positive.

    Source: SuperLoRA; the order of the weights, the start and the scale are ours. Its fixed shuffling and projection of
    the vector are left out.

    >>> SuperLoraConfig(r=8, tensor_order=3, target_modules=["q_proj", "v_proj"]).grouping
    'all'
    """

    grows_by_layers: ClassVar[bool] = False  # modes are the factors of a number of entries

    r: int = field(default=8, metadata={"help": "Rank of every mode."})
    tensor_order: int = field(default=3, metadata={"help": "Modes of the tensors."})
    num_factors: int = field(default=1, metadata={"help": "Tensors in the Kronecker product."})
    grouping: Grouping = field(default="all", metadata={"help": "Which weights form one vector."})
    alpha: float = field(default=16, metadata={"help": "The updates are scaled by alpha / r."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        check_num_modes("tensor_order", self.tensor_order, example=3)
        check_rank("tensor_order", self.tensor_order, _LARGEST_ORDER)
        check_rank("num_factors", self.num_factors, _LARGEST_NUM_FACTORS)
        check_is_bool("init_weights", self.init_weights)
        check_scale("alpha", self.alpha)
        if self.grouping not in get_args(Grouping):
            raise ValueError(f"grouping={self.grouping!r}: expected one of {', '.join(get_args(Grouping))}.")

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, FoldedUpdate]:
        """A range of its group's vector per site. Reads no weight."""
        groups = group_by_tensor(sites, _KEYS[self.grouping])
        shared = FoldedFactors({name: self._forms(group) for name, group in groups.items()})
        for name, forms in shared.forms.items():
            for k, form in enumerate(forms, 1):
                # A T that is not the last has entries of variance 1, the last one's first factors columns of length 1.
                for m, (size, rank) in enumerate(zip(form.modes, form.ranks), 1):
                    std = 1 / sqrt(size) if k == len(forms) else rank ** (-0.5 if form.has_core else -0.25)
                    if not (self.init_weights and (k, m) == (len(forms), len(form.modes))):
                        nn.init.normal_(getattr(shared, f"{name}_A_{k}_{m}"), std=std)
                if form.has_core:
                    nn.init.normal_(getattr(shared, f"{name}_C_{k}"))
        updates: dict[str, FoldedUpdate] = {}
        for name, group in groups.items():
            firsts = accumulate((site.out * site.in_ for site in group), initial=0)
            for site, first in zip(group, firsts):
                updates[site.name] = FoldedUpdate(shared, name, first, (site.out, site.in_), self.alpha / self.r)
        return {site.name: updates[site.name] for site in sites}

    def _forms(self, group: Sequence[Site]) -> tuple[Form, ...]:
        """The nearly equal modes dealt out to the tensors, each of which gets as many small ones as large ones."""
        modes = fold_modes(sum(site.out * site.in_ for site in group), self.tensor_order * self.num_factors)
        forms: list[Form] = []
        for k in range(self.num_factors):
            own = modes[k :: self.num_factors]
            ranks = tuple(min(self.r, mode) for mode in own)
            forms.append(Form(own, (min(ranks),) * 2 if self.tensor_order == 2 else ranks))
        return tuple(forms)


def _layer(site: Site) -> str:
    """Its name as far as the first number: `model.layers.0`."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", site.name)
    return _without_dots(site.name if match is None else match[0])


def _type(site: Site) -> str:
    """Its name without the numbers."""
    return _without_dots(re.sub(r"(?:^|(?<=\.))\d+(?=\.|$)", "n", site.name))


def _without_dots(name: str) -> str:
    """As `group_by_tensor` asks for."""
    return name.replace(".", "_")


_KEYS: Mapping[Grouping, Callable[[Site], str]] = {
    "all": lambda site: "all",
    "layer": _layer,
    "type": _type,
    "weight": lambda site: _without_dots(site.name),
}
