"""What the workers of test_compare_engine.py do: they import nothing, and die when they are told to."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace


def task(kind: str, folder: Path) -> SimpleNamespace:
    """In place of a cell, which would import transformers."""
    return SimpleNamespace(name=f"{kind} in {folder.name}", kind=kind, folder=folder)


def do(task: SimpleNamespace, on_share: Callable[[float], object]) -> str:
    """Answer with the process's id and variables, or be killed, or wait for ever beside a child."""
    with (task.folder / "tries").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if task.kind == "die" or (task.kind == "die once" and len(tries(task.folder)) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if task.kind == "exit":
        print("what it said last", flush=True)
        os._exit(3)
    if task.kind == "wait":
        child = subprocess.Popen(["sleep", "600"])
        (task.folder / "child.part").write_text(str(child.pid))
        (task.folder / "child.part").rename(task.folder / "child")
        time.sleep(600)
    on_share(0.5)
    return " ".join([str(os.getpid()), os.environ["OMP_NUM_THREADS"]])


def tries(folder: Path) -> list[str]:
    """The processes that tried, in order."""
    return (folder / "tries").read_text().split()
