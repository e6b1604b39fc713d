"""The folder where models that were made from other files are kept, under the digest of those files."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs

from tensorpeft.reports.files import make_once

_VARIABLE = "TENSORPEFT_CACHE"
_CHUNK_BYTES = 2**24


def cache_folder() -> Path:
    """The user's, or the one that the environment variable TENSORPEFT_CACHE names."""
    given = os.environ.get(_VARIABLE)
    return Path(given).expanduser().absolute() if given else platformdirs.user_cache_path("tensorpeft")


def find_or_make(
    files: Sequence[Path],  # whose bytes, one after the other, are the source
    name: str,  # that a person knows it by
    maker: str,  # what makes the folder, with its versions: others make it anew
    make: Callable[[Path], object],  # fills an empty folder
) -> Path:
    """The folder that is made of these files: it is whole, or not there, whenever a process is killed.

    Processes that want the same one at once wait for the first. What another call left unfinished is removed.
    """
    digest = hashlib.sha256(f"{maker} {_digest(files)}".encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / f"{name}-{digest}"
    if not folder.is_dir():  # asked without a lock: a cache may be one that this process only reads
        make_once(folder, make)
    return folder


def require_space(num_bytes: int, what: str) -> None:
    """Refuse to write what would not fit.

    Raises:
        ValueError: the cache's disk has not so many bytes free.
    """
    folder = cache_folder()
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"{what}: {num_bytes / 1e6:.0f} MB are needed, but {free / 1e6:.0f} MB are free where {folder} is. Make "
            f"room, or name a folder on another disk ({_VARIABLE}, --cache)."
        )


def _digest(files: Sequence[Path]) -> str:
    """That of the files' bytes; read once, and anew where a size or a time has changed."""
    stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    note = cache_folder() / "sources" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    if note.is_file():
        return note.read_text(encoding="ascii")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(f".{os.getpid()}-{threading.get_ident()}")  # whoever else notes it notes the same
    partial.write_text(digest.hexdigest(), encoding="ascii")
    os.replace(partial, note)
    return digest.hexdigest()
