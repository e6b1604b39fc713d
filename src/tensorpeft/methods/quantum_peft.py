"""Quantum-PEFT (arXiv 2503.05431): singular vectors from circuits of rotations, so that parameters grow with log₂."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import pi

from torch import nn

from tensorpeft.networks.group import join
from tensorpeft.networks.pauli import PauliUpdate
from tensorpeft.plugin.config import Bases, TensorConfig, check_is_bool, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site

# What a configuration, which may come from a damaged file, can ask for.
_LARGEST_NUM_LAYERS = 2**14


@register("quantumpeft")
@dataclass
class QuantumPeftConfig(TensorConfig):
    """`ΔW = alpha · U diag(λ) Vᵀ` per weight: U (out, r) and V (in, r) orthonormal, made of few angles each.

    The circuit of a side of size 2^q has q + 2 L (q − 1) angles for L layers; other sizes are cut from the next power
    of two, and their columns are shorter. Query and value of LLaMA-2-7B at r = 4, L = 1 have 4,608 parameters; LoRA's
    have 2,097,152.

    Args:
        r: number of singular values λ, the rank; at most the smaller side of the weight, to which it is cut.
        num_layers: L, the layers of both circuits.
        alpha: the updates are scaled by alpha. Columns of U and V having length one, or less, λ wants a larger learning
            rate, or alpha, than LoRA's factors do.
        init_weights: True: λ starts at zero, so that the update does; the angles are uniform in (−π, π). False: λ is
            normal, which is *not* the identity.

    Raises:
        ValueError: a rank or number of layers below 1, an alpha that is not positive.

    Source: Quantum-PEFT; the order of the rotations (inferred from the number of parameters), the start, the scale, and
    what is done with a size that is no power of two are ours.

    >>> QuantumPeftConfig(r=4, target_modules=["q_proj", "v_proj"]).num_layers
    1
    """

    r: int = field(default=4, metadata={"help": "Number of singular values."})
    num_layers: int = field(default=1, metadata={"help": "Layers of the circuits."})
    alpha: float = field(default=16, metadata={"help": "The updates are scaled by alpha."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        check_rank("num_layers", self.num_layers, _LARGEST_NUM_LAYERS)
        check_is_bool("init_weights", self.init_weights)
        check_scale("alpha", self.alpha)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, PauliUpdate]:
        """Two circuits per site. Reads no weight."""
        return join({site.name: self._build_one(site) for site in sites})

    def _build_one(self, site: Site) -> PauliUpdate:
        update = PauliUpdate(site.out, site.in_, self.r, self.num_layers, self.alpha)
        nn.init.uniform_(update.up_angles, -pi, pi)
        nn.init.uniform_(update.down_angles, -pi, pi)
        if not self.init_weights:
            nn.init.normal_(update.diagonal)
        return update
