"""Processes of this machine that run cells, each started again when it dies; killed with all that they started."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from tensorpeft.studies.compare.cells import Cell
from tensorpeft.studies.compare.slots import ATTEMPTS, LostCellError, StoppedError, Work
from tensorpeft.training.progress import Progress

# Not as a module of the package, whose import takes seconds: before it, the worker looks after its own end.
_START = f"import runpy; runpy.run_path({str(Path(__file__).with_name('worker.py'))!r}, run_name='__main__')"
_POLL_SECONDS = 0.5
_DYING_SECONDS = 5


def make_workers(
    work: Work,
    number: int,
    gpus: Sequence[str],  # as CUDA_VISIBLE_DEVICES names them
    logs: Path,  # folder
) -> list["Worker"]:
    """Workers that share the processor's cores, and take the GPUs in turns."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _num_cores() // number))
    workers = []
    for index in range(number):
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        workers.append(Worker(work, {"OMP_NUM_THREADS": threads, **gpu}, logs / f"worker-{index}.txt"))
    return workers


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Worker:
    """A slot: a process of its own, started at its first cell, which keeps what the work keeps from cell to cell.

    It leads a process group, so that Ctrl-C in a terminal reaches this process alone, and that all it has started can
    be killed with it. It kills its group itself when this process dies.

    Args:
        work: done with each cell.
        environment: variables on top of this process's, there before torch is imported.
        log: file for what it prints.
    """

    def __init__(self, work: Work, environment: Mapping[str, str], log: Path) -> None:
        self._work = work
        self._environment = dict(environment)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_stopped = False
        self._lock = threading.Lock()  # of process and connection, which stop ends from another thread

    def run(self, cell: Cell, on_progress: Callable[[Progress], object]) -> str:
        """What the work returns for a cell; see `Slot`."""
        code = 0
        for _ in range(ATTEMPTS):
            process, connection = self._start()
            message = _ask(process, connection, (self._work, cell))
            while message is not None and not isinstance(message, str):
                on_progress(message)
                message = _ask(process, connection)
            if message is not None:
                return message
            code = self._end()
        if self._is_stopped:
            raise StoppedError("the workers were stopped")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = "; where memory runs out, use fewer workers" if code == -signal.SIGKILL else ""
        raise LostCellError(
            f"its process died {ATTEMPTS} times, the last time {how}{hint}; what it printed is in {self._log}"
        )

    def stop(self) -> None:
        """Kill it; see `Slot`."""
        self._is_stopped = True
        with self._lock:
            if self._process is not None:
                _kill(self._process)

    def _start(self) -> tuple["subprocess.Popen[bytes]", Connection]:
        with self._lock:
            if self._is_stopped:
                raise StoppedError("the workers were stopped")
            if self._process is None or self._connection is None:
                self._log.parent.mkdir(parents=True, exist_ok=True)
                self._connection, theirs = Pipe()
                command = [sys.executable, "-c", _START, str(theirs.fileno())]
                with theirs, self._log.open("ab") as log:
                    self._process = subprocess.Popen(
                        command,
                        env={**os.environ, **self._environment},
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
            return self._process, self._connection

    def _end(self) -> int:
        """The exit code of a process that is dying, whose children are killed; the next cell gets another one."""
        with self._lock:
            assert self._process is not None
            assert self._connection is not None
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed its end, and no more
                self._process.wait(_DYING_SECONDS)
            code = _kill(self._process)
            self._connection.close()
            self._process = self._connection = None
            return code


def _kill(process: "subprocess.Popen[bytes]") -> int:
    """Kill a process and all of its group; its exit code."""
    # Where it is dead already, its children may live, hold the cell's lock, and write.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _ask(
    process: "subprocess.Popen[bytes]",
    connection: Connection,
    question: object = None,  # sent before; None: nothing
) -> Progress | str | None:  # how far a cell is, or its end; None: the process died
    """What a worker sends next."""
    try:
        if question is not None:
            connection.send(question)
        # No end of file tells that it died while children that it forked hold its end of the connection.
        while not connection.poll(_POLL_SECONDS):
            if process.poll() is not None:
                return None
        return connection.recv()
    except (EOFError, OSError):
        return None
