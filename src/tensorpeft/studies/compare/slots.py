"""Room for one cell at a time, in this process, in another or on another machine."""

from collections.abc import Callable
from typing import Protocol

from tensorpeft.studies.compare.cells import Cell
from tensorpeft.training.progress import Progress

Work = Callable[[Cell, Callable[[Progress], object]], str]  # such as `run_cell`; other processes import it by its name
ATTEMPTS = 3  # at a cell whose process dies


class LostCellError(RuntimeError):
    """The process of a cell died, each time that it was tried."""


class StoppedError(RuntimeError):
    """The engine was stopped."""


class Slot(Protocol):
    """Room for one cell at a time."""

    def run(self, cell: Cell, on_progress: Callable[[Progress], object]) -> str:
        """What the work returns for a cell.

        Raises:
            LostCellError: its process died, each time.
            StoppedError: `stop` was called, before or meanwhile.
        """
        ...

    def stop(self) -> None:
        """End what runs, at once, and run nothing more; from any thread."""
        ...


class Here:
    """The slot that this process is.

    Args:
        work: done with each cell.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    def run(self, cell: Cell, on_progress: Callable[[Progress], object]) -> str:
        """What the work returns for a cell."""
        return self._work(cell, on_progress)

    def stop(self) -> None:
        """Nothing: what runs is the caller."""
