"""Files and folders that are whole or not there: written beside, under another name, and renamed at the end."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

UNFINISHED = ".unfinished"


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:  # where to write
    """A name beside ``path`` for a file or a folder, which becomes ``path`` when the block ends.

    If the block raises, what it wrote is removed and a file that was at ``path`` stays as it was. What a killed process
    left is removed by the next. One process at a time may write a path; a folder must not be there yet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    _remove(unfinished)
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        _remove(unfinished)
        raise


def make_once(folder: Path, make: Callable[[Path], object], is_made: Callable[[Path], bool] = Path.is_dir) -> None:
    """Let a folder be made, under another name, unless it is; whoever wants it at once waits for the first.

    A folder of which `is_made` says no is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not is_made(folder):
            if folder.is_dir():
                shutil.rmtree(folder)
            with write_whole(folder) as unfinished:
                unfinished.mkdir()
                make(unfinished)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file, a newline after every line, whole."""
    with write_whole(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def write_json(path: Path, value: Any) -> None:
    """Write `to_json` of a value, indented, whole."""
    write_lines(path, [to_json(value, indent=1)])


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write `to_json` of every row, a line each, whole; the rows are read one by one."""
    write_lines(path, map(to_json, rows))


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON in which a number that is none, or is infinite, is null, and what is no JSON is written as text."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
