"""Cells as tasks of a Ray cluster."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from tensorpeft.studies.compare.cells import Cell
from tensorpeft.studies.compare.engine import ATTEMPTS, LostCellError, StoppedError, Work


class RaySlot:
    """A slot that hands its cell to Ray, wherever there is room.

    Args:
        task: Ray's remote function `_run_on_node`.
        work: done with each cell.
    """

    def __init__(self, task: Any, work: Work) -> None:
        self._task = task
        self._work = work
        self._running: Any = None
        self._is_stopped = False

    def run(self, cell: Cell, on_share: Callable[[float], object]) -> str:
        """What the work returns for a cell; see `Slot`. Shares are not told."""
        if self._is_stopped:
            raise StoppedError("the cluster's tasks were stopped")
        self._running = self._task.remote(os.getcwd(), self._work, cell)
        try:
            return ray.get(self._running)
        except RayError as error:
            if self._is_stopped:
                raise StoppedError("the cluster's tasks were stopped") from None
            raise LostCellError(f"Ray lost it, {ATTEMPTS} times: {type(error).__name__}: {error}") from None
        finally:
            self._running = None

    def stop(self) -> None:
        """Kill the task; see `Slot`."""
        self._is_stopped = True
        running = self._running
        if running is not None:
            ray.cancel(running, force=True)


@contextlib.contextmanager
def ray_slots(
    work: Work,
    address: str,  # such as ray://head:10001 or auto; "": a cluster that runs on this machine, or else a new one
) -> Iterator[list[RaySlot]]:
    """A slot per cell that the cluster has room for, a GPU each where it has any, and OMP_NUM_THREADS processors, or 1.

    Raises:
        ConnectionError: there is no cluster at the address.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
    try:
        threads = int(os.environ.get("OMP_NUM_THREADS", 1))
        room = ray.cluster_resources()
        gpus, number = int(room.get("GPU", 0)), max(1, int(room.get("CPU", 1)) // threads)
        task: Any = ray.remote(_run_on_node)
        task = task.options(num_cpus=threads, num_gpus=1 if gpus else 0, max_retries=ATTEMPTS - 1)
        yield [RaySlot(task, work) for _ in range(min(gpus, number) if gpus else number)]
    finally:
        if is_ours:
            ray.shutdown()


def _run_on_node(folder: str, work: Work, cell: Cell) -> str:
    """The work for a cell, in the folder that the command was called in: a recipe's paths may begin there."""
    if os.path.isdir(folder):
        os.chdir(folder)
    return work(cell, lambda share: None)
