"""What runs cells: slots, each of which runs one at a time, in this process, in others or on other machines."""

import contextlib
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

import torch

from tensorpeft.studies.compare.cells import Cell
from tensorpeft.studies.compare.progress import CellsBar
from tensorpeft.studies.compare.slots import Here, Slot, StoppedError, Work
from tensorpeft.studies.compare.workers import make_workers
from tensorpeft.training.progress import Progress

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Engine:
    """Runs cells in the first slot that is free.

    Args:
        slots: at least one.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = tuple(slots)
        self._free: queue.Queue[Slot] = queue.Queue()
        for slot in slots:
            self._free.put(slot)

    def each(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """A function of every item, in their order: one after the other, or as many at once as there are slots.

        Where one raises an error, or the user interrupts, all that runs is ended. May be called within a function.
        """
        if len(self._slots) == 1 or len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(len(items), len(self._slots))) as threads:
            futures = [threads.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    error = future.exception()
                    if error is not None and not isinstance(error, StoppedError):  # that is what an error leads to
                        raise error
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise
        return [future.result() for future in futures]

    def run(self, cell: Cell, bar: CellsBar) -> str:
        """What the work returns for a cell, once there was a free slot.

        Raises:
            LostCellError: its process died, each time.
            StoppedError: the engine was stopped.
        """
        slot = self._free.get()
        try:
            bar.tell(cell.name, Progress())
            return slot.run(cell, lambda progress: bar.tell(cell.name, progress))
        finally:
            bar.end(cell.name)
            self._free.put(slot)

    def stop(self) -> None:
        """End all cells at once, with all processes that they started."""
        for slot in self._slots:
            slot.stop()


def check_engine(workers: int | None, ray: str | None) -> None:
    """Refuse what `open_engine` cannot do.

    Raises:
        ValueError: both are given, or there would be no worker.
    """
    if workers is not None and ray is not None:
        raise ValueError(f"--workers {workers} and --ray: cells run in one or the other. Pass one of them.")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: expected at least 1.")


@contextlib.contextmanager
def open_engine(
    work: Work,
    logs: Path,  # folder for what workers print
    workers: int | None = None,  # processes; None: this one
    ray: str | None = None,  # address of a cluster; "": one that runs on this machine, or else a new one; None: no Ray
) -> Iterator[Engine]:
    """An engine that runs cells here, in several workers of this machine, or on a Ray cluster; stopped at the end.

    Raises:
        ValueError: as `check_engine`; or no machine of the cluster has room for a cell.
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    check_engine(workers, ray)
    with contextlib.ExitStack() as stack:
        if ray is not None:
            from tensorpeft.studies.compare.on_ray import ray_slots

            slots = stack.enter_context(ray_slots(work, ray))
        else:
            slots = [Here(work)] if workers is None else make_workers(work, workers, visible_gpus(), logs)
        engine = Engine(slots)
        stack.callback(engine.stop)
        yield engine


def visible_gpus() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip()]


@contextlib.contextmanager
def one_gpu() -> Iterator[None]:
    """Leave this process the first of several GPUs: what is timed here is what a worker runs with its one."""
    before, gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), visible_gpus()
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif len(gpus) > 1:
            del os.environ["CUDA_VISIBLE_DEVICES"]
