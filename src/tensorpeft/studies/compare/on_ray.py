"""Cells as tasks of a Ray cluster."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from rich.text import Text

from tensorpeft.studies.compare.cells import Cell
from tensorpeft.studies.compare.slots import ATTEMPTS, LostCellError, StoppedError, Work
from tensorpeft.training.progress import Progress

_STARTS_WITHIN = 300  # seconds that Ray waits for its own head process: its 30 are too few for a machine under load


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
        self._lock = threading.Lock()  # no task may start behind the back of stop

    def run(self, cell: Cell, on_progress: Callable[[Progress], object]) -> str:
        """What the work returns for a cell; see `Slot`. Progress is not told."""
        with self._lock:
            if self._is_stopped:
                raise StoppedError("the cluster's tasks were stopped")
            self._running = running = self._task.remote(os.getcwd(), self._work, cell)
        try:
            return ray.get(running)
        except RayError as error:
            if self._is_stopped:
                raise StoppedError("the cluster's tasks were stopped") from None
            text = Text.from_ansi(str(error)).plain.strip()  # a traceback of the node's, its cause last
            raise LostCellError(f"Ray could not run it: {text.splitlines()[-1]}\n\n{text}") from None
        finally:
            with self._lock:
                self._running = None

    def stop(self) -> None:
        """Kill the task; see `Slot`."""
        with self._lock:
            self._is_stopped = True
            if self._running is not None:
                ray.cancel(self._running, force=True)


@contextlib.contextmanager
def ray_slots(
    work: Work,
    address: str,  # such as head:6379; "": a cluster that runs on this machine, or else a new one
) -> Iterator[list[RaySlot]]:
    """A slot per cell that the cluster has room for, a GPU each where it has any, and OMP_NUM_THREADS processors, or 1.

    Raises:
        ConnectionError: there is no cluster at the address.
        ValueError: no machine of it has room for a cell.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(_STARTS_WITHIN))
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
    try:
        threads = int(os.environ.get("OMP_NUM_THREADS", 1))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 1 if any(node.get("GPU") for node in nodes) else 0  # of a cell
        number = sum(_num_cells(node, threads, gpus) for node in nodes)
        if number == 0:
            gpu = " and a GPU" if gpus else ""
            raise ValueError(
                f"--ray: no machine of the cluster has {threads} processors (OMP_NUM_THREADS){gpu}. Set OMP_NUM_THREADS"
                " to what a cell may take."
            )
        task: Any = ray.remote(_run_on_node)
        task = task.options(num_cpus=threads, num_gpus=gpus, max_retries=ATTEMPTS - 1)
        yield [RaySlot(task, work) for _ in range(number)]
    finally:
        if is_ours:
            ray.shutdown()


def _num_cells(
    node: Mapping[str, float],  # what it has, as Ray says it
    threads: int,
    gpus: int,
) -> int:
    """How many cells a machine has room for."""
    cells = int(node.get("CPU", 0)) // threads
    return min(cells, int(node.get("GPU", 0))) if gpus else cells


def _run_on_node(folder: str, work: Work, cell: Cell) -> str:
    """The work for a cell, in the folder that the command was called in: a recipe's paths may begin there."""
    if os.path.isdir(folder):
        os.chdir(folder)
    return work(cell, lambda progress: None)
