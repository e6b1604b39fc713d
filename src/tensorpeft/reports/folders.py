"""Folders of results: one command at a time writes one, and files of a result change together."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tensorpeft.reports.files import UNFINISHED

LOCK = ".lock"


@contextlib.contextmanager
def sole_writer(
    folder: Path,
    file: str = "",  # the only file of the folder that is written
) -> Iterator[None]:
    """Keep others from writing to a folder, which is made, until the block ends; left empty, it is removed again.

    With ``file`` they are kept from this file alone. The system releases the lock of a process that dies, in whatever
    way. Processes that it starts need none.

    Raises:
        BlockingIOError: another process, or another call of this one, writes to the folder, or this file in it.
        FileExistsError: it, or a folder that it would lie in, is a file.
    """
    if files := [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]:
        raise FileExistsError(f"{folder}: {files[0]} is a file; expected a folder, or a name that is free.")
    held = folder / (f".{file}{LOCK}" if file else LOCK)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(held)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        kind = "file" if file else "folder"
        raise BlockingIOError(
            f"{folder / file}: another process is writing to this {kind}. Wait for its end, or name another {kind}."
        ) from None
    try:
        yield
    finally:
        # Before it is released: afterwards the file may be the lock of another process.
        held.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def replace_files(
    folder: Path,
    last: str,  # the file without which the others are nothing
    stale: Iterable[str] = (),  # patterns of further files of an earlier result, which are removed
) -> Iterator[Path]:  # where to write
    """A folder within `folder`, whose files replace those of the same names when the block ends.

    If the block raises, nothing has changed. While the files are put in place there is no file ``last``, so that those
    of two results are never taken for one.
    """
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        (folder / last).unlink(missing_ok=True)
        for path in [path for pattern in stale for path in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == last):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
