"""Processes of commands and functions, forked from one that has done the imports: these take ten seconds."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tensorpeft_cli import run

# Not forked from this one, which has threads. Where importing would wake a GPU, a fork could not use it.
_FORKS = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
_CONTEXT = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
if _FORKS:
    _CONTEXT.set_forkserver_preload(
        ["tensorpeft.studies.compare.run", "tensorpeft.export", "bitsandbytes", "trl.trainer.sft_trainer"]
    )


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that calls a function of a module, in the environment that holds here, and ends."""
    process = _CONTEXT.Process(target=_call, args=(dict(os.environ), function, *arguments))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """SIGKILL, and its end."""
    process.kill()
    process.join()


class Command:
    """``tensorpeft`` with these words, in such a process; what it prints is added to a file."""

    def __init__(self, printed: Path, *words: object):
        self.printed = printed
        self.process = start(_run, printed, [str(word) for word in words])

    def finish(self, seconds: float = 600) -> str:
        """What it printed; it must succeed in so many seconds."""
        self.process.join(seconds)
        kill(self.process)
        text = self.printed.read_text(encoding="utf-8")
        assert self.process.exitcode == 0, text
        return text


def _call(environment: dict[str, str], function: Callable[..., Any], *arguments: Any) -> None:
    gc.freeze()  # what was imported stays: no collection need look at it
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # which torch reads when it is imported
        torch.set_num_threads(int(threads))
    function(*arguments)


def _run(printed: Path, words: list[str]) -> None:
    with open(printed, "a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv[1:] = words
    sys.exit(run())
