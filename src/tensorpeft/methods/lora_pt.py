"""LoRA-PT (arXiv 2407.11292): the principal part of the stacked weights' t-SVD, fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tensorpeft.methods.common.tubal_stacks import build_stacks
from tensorpeft.networks.tubal import StackUpdate, leading_triplets
from tensorpeft.plugin.config import Bases, TensorConfig, check_rank
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site


@register("lorapt")
@dataclass
class LoraPtConfig(TensorConfig):
    """`W = W0 + f(T) − f(T_start)`: f(T) the tensor of all weights of one shape with t-SVD factors T, of tubal rank r.

    n weights W_j are stacked and Fourier transformed along the stack; the leading r singular triplets of every slice
    are trained, `f(T)_j = 1/n Σ_k ω^{jk} U_k S_k V_kᴴ`, from those of the weights on. The paper trains them beside a
    residual, W0 without them, which is the same; we leave W0 as it is. It has no scale. The n weights have
    n r (out + in + 1) parameters, about as many as LoRAs of rank r; but each update is of rank up to 2 n r.

    Args:
        r: tubal rank, the triplets per slice; at most the smaller side of the weights, to which it is cut.

    Raises:
        ValueError: a rank below 1; weights that are not finite.

    Source: LoRA-PT; stacks of one shape in the model's order, and the real form of the factors, are ours.

    >>> LoraPtConfig(r=1, target_modules=["q_proj", "v_proj"]).r
    1
    """

    grows_by_layers: ClassVar[bool] = False  # every weight's update is made of slices for all

    r: int = field(default=1, metadata={"help": "Tubal rank: triplets per slice."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, StackUpdate]:
        """A slice of its shape's stack per site. Reads the weights of one stack at a time."""
        return build_stacks(sites, bases, self.r, leading_triplets, trains_all=True)
