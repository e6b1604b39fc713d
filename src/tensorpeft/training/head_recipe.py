"""A recipe's ``head``."""

from collections.abc import Sequence
from dataclasses import dataclass

from tensorpeft.training.fields import is_whole


@dataclass(frozen=True)
class HeadRecipe:
    """What is trained of a head that starts from noise, where it is not all of it: a LoRA of some of its linear layers.

    All else of the head's linear layers stays as it starts. What a run saves is a whole head, the LoRA in its weights.

    Args:
        target_modules: endings of the layers' names, such as [dense]; a head that is one layer is called classifier
            or score.
        r: rank.
        alpha: the updates are scaled by alpha / r.
    """

    target_modules: Sequence[str]
    r: int = 8
    alpha: float = 16

    def __post_init__(self) -> None:
        names = self.target_modules
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"head.target_modules={names!r}: expected a list of names, such as [dense].")
        if not is_whole(self.r, at_least=1):
            raise ValueError(f"head.r={self.r!r}: expected a whole number, at least 1.")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not self.alpha > 0:
            raise ValueError(f"head.alpha={self.alpha!r}: expected a number above 0.")
