"""A recipe's ``head``."""

from collections.abc import Sequence
from dataclasses import dataclass

from tensorpeft.training.fields import is_number, is_whole


@dataclass(frozen=True)
class HeadRecipe:
    """What is trained of a head that starts from noise, where it is not all of it.

    Of some of its linear layers a LoRA, or a tensor train in place of the weight. What a run saves is a whole head of
    plain weights.

    Args:
        target_modules: endings of the layers' names, such as [dense]; a head that is one layer is called classifier
            or score.
        r: rank of the LoRA; 8 where neither it nor `tt_rank` is given.
        alpha: the LoRA's updates are scaled by alpha / r; 16 where it is not given.
        tt_rank: instead of a LoRA, the layers' weights are tensor trains of this bond dimension, which start from
            noise; their biases are trained too. Source: LoRETTA (arXiv 2402.11417), "tensorized classifier".
        train_others: whether the head's other linear layers are trained whole; otherwise they stay as they start.
    """

    target_modules: Sequence[str]
    r: int | None = None
    alpha: float | None = None
    tt_rank: int | None = None
    train_others: bool = False

    def __post_init__(self) -> None:
        names = self.target_modules
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"head.target_modules={names!r}: expected a list of names, such as [dense].")
        for name in ("r", "tt_rank"):
            rank = getattr(self, name)
            if rank is not None and not is_whole(rank, at_least=1):
                raise ValueError(f"head.{name}={rank!r}: expected a whole number, at least 1.")
        alpha = self.alpha
        if alpha is not None and not is_number(alpha, above=0):
            raise ValueError(f"head.alpha={alpha!r}: expected a number above 0.")
        if self.tt_rank is not None and (self.r, alpha) != (None, None):
            raise ValueError(
                f"head: r={self.r!r}, alpha={alpha!r} and tt_rank={self.tt_rank}: a layer has a LoRA or is a tensor "
                "train. Take out r and alpha, or tt_rank (null takes back what is inherited)."
            )
        if not isinstance(self.train_others, bool):
            raise ValueError(f"head.train_others={self.train_others!r}: expected true or false.")
