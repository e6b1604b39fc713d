"""QuanTA (arXiv 2406.00132): every update a circuit of tensors that each act on two axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt

from torch import nn

from tensorpeft.modes import factor_modes
from tensorpeft.networks.circuit import CircuitUpdate, circuit_shapes
from tensorpeft.plugin.config import Bases, TensorConfig, check_is_bool, check_modes, check_num_modes
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site

# The paper's axes for LLaMA-2-7B.
_AXES_OF_THE_PAPER = {(4096, 4): (16, 8, 8, 4)}


@register("quanta")
@dataclass
class QuantaConfig(TensorConfig):
    """`ΔW = C(T) − C(I)`: the features as axes, and one trained tensor T for every two of them, one after the other.

    The update has a high rank. A 4096 x 4096 weight at the defaults, 16·8·8·4, has 43,008 parameters; LoRA of rank 8
    has 65,536.

    Args:
        num_axes: axes that the features of each side are reshaped to, at least 2.
        modes: {size: [mode, …]}, the axes of sizes to be reshaped otherwise; one mode per axis.
        init_weights: True: every tensor starts as the identity, and their circuit's is subtracted, so that the update
            is zero. False: at the identity plus Gaussian noise, which is *not* the identity.

    Raises:
        ValueError: fewer than 2 axes, modes that do not multiply to their size or are not one per axis; when built,
            axes that make more parameters than the weight has, such as a prime size's.

    Source: QuanTA (arXiv 2406.00132). The tensors are kept as their deviations from the start (`networks.circuit`), so
    that weight decay pulls to the pretrained model and no frozen copy need be saved; the axes of other sizes, and how a
    rectangular weight changes from those of one side to the other's, are ours.

    >>> QuantaConfig(target_modules=["q_proj", "v_proj"]).num_axes
    4
    """

    num_axes: int = field(default=4, metadata={"help": "Axes that the features of each side are reshaped to."})
    modes: dict[int, list[int]] | None = field(default=None, metadata={"help": "{size: axes} that override ours."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_num_modes("num_axes", self.num_axes, example=4)
        check_is_bool("init_weights", self.init_weights)
        self.modes = check_modes(self.modes, self.num_axes, of="axis")

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, CircuitUpdate]:
        """A circuit per site. Reads no weight."""
        return {site.name: self._build_one(site) for site in sites}

    def _build_one(self, site: Site) -> CircuitUpdate:
        shapes = circuit_shapes(self._axes(site.out), self._axes(site.in_))
        size = sum(map(prod, shapes.tensors))
        if size > site.out * site.in_:
            raise ValueError(
                f"{site.name}: the axes {shapes.out_axes} x {shapes.in_axes} make {size:,} parameters, more than the "
                f"weight's {site.out * site.in_:,}. Pass other modes, more axes, or name it in exclude_modules."
            )
        update = CircuitUpdate(shapes)
        if not self.init_weights:
            for deviation in update.deviations():
                nn.init.normal_(deviation, std=0.5 / sqrt(deviation[0, 0].numel()))
        return update

    def _axes(self, size: int) -> Sequence[int]:
        axes = (self.modes or {}).get(size) or _AXES_OF_THE_PAPER.get((size, self.num_axes))
        return axes or sorted(factor_modes(size, self.num_axes), reverse=True)
