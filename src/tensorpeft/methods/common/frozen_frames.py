"""What the methods have in common whose frames may be frozen."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field
from typing import Literal

from tensorpeft.plugin.config import FramedConfig


@dataclass
class FreezableFramesConfig(FramedConfig, ABC):
    """The field of such a method.

    Args:
        train: "all", frames and cores; or "cores": the frames are frozen as they start.

    Raises:
        ValueError: another `train`.
    """

    train: Literal["all", "cores"] = field(default="all", metadata={"help": '"all", or "cores": frames are frozen.'})

    def __post_init__(self) -> None:
        """Check what is trained."""
        if self.train not in ("all", "cores"):
            raise ValueError(
                f'train={self.train!r}: expected "all" (frames and cores) or "cores" (the frames are frozen).'
            )
        super().__post_init__()

    def freezes_frames(self) -> bool:
        """Whether U and V stay as they start."""
        return self.train == "cores"
