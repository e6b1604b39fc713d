"""One bar over all cells of a comparison."""

import threading

from rich.console import Console

from tensorpeft.reports.terminal import make_progress
from tensorpeft.training.progress import Progress


class CellsBar:
    """How many cells are done, and which run now; a context. Several threads may tell it.

    Args:
        console: where it is drawn.
        total: cells to train.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._lock = threading.Lock()
        self._done, self._total = 0, total
        self._running: dict[str, Progress] = {}  # cells by name
        self._progress = make_progress(console, width=52)
        self._task = self._progress.add_task("", total=total)
        self._draw()

    def __enter__(self) -> "CellsBar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def tell(self, name: str, progress: Progress) -> None:
        """A cell runs, and is so far."""
        with self._lock:
            self._running[name] = progress
            self._draw()

    def end(self, name: str) -> None:
        """A cell runs no more."""
        with self._lock:
            self._running.pop(name, None)
            self._draw()

    def count(self) -> None:
        """A cell has been trained, or had been before."""
        with self._lock:
            self._done += 1
            self._draw()

    def expect(self, cells: int) -> None:
        """So many more are to be trained."""
        with self._lock:
            self._total += cells
            self._draw()

    def describe(self, text: str) -> None:
        """Something else than a cell goes on."""
        self._progress.update(self._task, description=text)

    def _draw(self) -> None:
        names = [name + ("" if p.loss is None else f", loss {p.loss:.3f}") for name, p in self._running.items()]
        text = names[0] if len(names) == 1 else f"{len(names)} at once: {'; '.join(names)}" if names else ""
        done = min(self._done + sum(progress.share for progress in self._running.values()), self._total)
        self._progress.update(self._task, description=text, completed=done, total=self._total)
