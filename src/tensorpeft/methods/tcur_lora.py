"""tCURLoRA (arXiv 2501.02227): columns and rows of the stacked weights, and small trained matrices between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tensorpeft.methods.common.tubal_stacks import build_stacks
from tensorpeft.networks.tubal import StackUpdate, Triplets, columns_and_rows
from tensorpeft.plugin.config import Bases, TensorConfig, check_rank, check_scale
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site


@register("tcurlora")
@dataclass
class TcurLoraConfig(TensorConfig):
    """`ΔW_j = alpha / (n c) Σ_k ω^{jk} C_k U_k R_k`: C and R of the n stacked weights of one shape; U_k (r, r).

    The weights are Fourier transformed along the stack; C_k has r columns of slice k, R_k r rows, the longest ones, of
    the same places in all slices. The U_k of n weights, n r² parameters, are trained; C and R are frozen, and saved.

    Args:
        r: tubal rank, the columns and rows per slice; at most the smaller side of the weights, to which it is cut.
        alpha: the updates are scaled by alpha / c, c the root mean square of the entries where C and R cross.

    Raises:
        ValueError: a rank below 1, an alpha that is not positive; weights that are not finite.

    Source: tCURLoRA and its code, for the choice of columns and rows. The paper's U starts at the pseudoinverse of the
    block where they cross, which it subtracts again: ours is the difference, from zero on. The scale is ours: entries
    of about one are as large as the pseudoinverse's.

    >>> TcurLoraConfig(r=8, target_modules=["q_proj", "v_proj"]).alpha
    1
    """

    grows_by_layers: ClassVar[bool] = False  # every weight's update is made of slices for all

    r: int = field(default=8, metadata={"help": "Tubal rank: columns and rows per slice."})
    alpha: float = field(default=1, metadata={"help": "The updates are scaled by alpha."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("r", self.r)
        check_scale("alpha", self.alpha)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, StackUpdate]:
        """A slice of its shape's stack per site. Reads the weights of one stack at a time."""
        return build_stacks(sites, bases, self.r, self._decompose, trains_all=False)

    def _decompose(self, weights: Tensor, rank: int) -> Triplets:
        left, core, right = columns_and_rows(weights, rank)
        return Triplets(left * self.alpha, core, right)
