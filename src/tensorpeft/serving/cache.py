"""Folders that are made once, under a key, of no more bytes together than a person said."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from tensorpeft.reports.files import UNFINISHED, write_whole

_LOCK, _DIGEST, _USERS = ".lock", ".digest", ".users"
_PATIENCE = 600  # seconds that another process may take to make a folder


class BoundedCache:
    """Folders by key, each whole or not there; the ones that were used longest ago make room for new ones.

    What one of these objects has handed out is kept as long as it lives, in whichever process: an engine reads such a
    folder again whenever it has dropped the adapter from memory. Any number of processes may share one cache; one at a
    time looks into it, or makes a folder.

    Args:
        folder: where they are; made when the first is asked for.
        max_bytes: of all files of all folders.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._users = folder / _USERS
        self._name = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._own = FileLock(self._users / (self._name + _LOCK), thread_local=False)

    def find_or_make(
        self,
        key: str,  # a plain name
        make: Callable[[Path], object],  # fills an empty folder
    ) -> Path:
        """The folder of a key; one whose files are not as they were written is made anew.

        Raises:
            OSError: there is no room for it, here or on the disk; or another process makes one for minutes. Whatever
                is raised, by `make`, too, no half-made folder remains.
        """
        self._users.mkdir(parents=True, exist_ok=True)
        entry = self._folder / key
        with FileLock(self._folder / _LOCK, timeout=_PATIENCE):
            for left in self._folder.glob(f"*{UNFINISHED}"):  # by a killed process: no other makes one now
                shutil.rmtree(left)
            if not _is_whole(entry):
                shutil.rmtree(entry, ignore_errors=True)
                with write_whole(entry) as unfinished:
                    unfinished.mkdir()
                    make(unfinished)
                    (unfinished / _DIGEST).write_text(_digest(unfinished), encoding="ascii")
                    self._make_room(_size(unfinished))
            os.utime(entry)
            self._hold(key)
        return entry

    def _hold(self, key: str) -> None:
        """Say that this process uses a folder, in a file that counts as long as its lock is held."""
        if self._own.is_locked and not os.path.exists(self._own.lock_file):
            self._own.release(force=True)  # the cache was cleared: nobody sees this lock any more
        if not self._own.is_locked:
            self._own.acquire()
        with (self._users / self._name).open("a", encoding="utf-8") as file:
            file.write(f"{key}\n")

    def _held(self) -> set[str]:
        """Keys of all living processes; forgets the dead."""
        keys = set[str]()
        for path in self._users.glob(f"*{_LOCK}"):
            user, lock = path.with_suffix(""), FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                keys |= set(user.read_text(encoding="utf-8").split()) if user.is_file() else set()
                continue
            user.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            lock.release()
        return keys

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was used longest ago until so many bytes more are within the limit."""
        entries = [path for path in self._folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {path: _size(path) for path in entries if not path.name.endswith(UNFINISHED)}
        excess = sum(sizes.values()) + num_bytes - self._max_bytes
        if excess <= 0:
            return
        held = self._held()
        free = sorted((path for path in sizes if path.name not in held), key=lambda path: path.stat().st_mtime)
        if sum(sizes[path] for path in free) < excess:
            raise OSError(
                errno.ENOSPC,
                f"{num_bytes / 1e6:.1f} MB more would not be within the {self._max_bytes / 1e9:g} GB that are allowed: "
                f"{len(sizes) - len(free)} folders are in use by running servers",
                str(self._folder),
            )
        for path in free:
            if excess <= 0:
                break
            shutil.rmtree(path)
            excess -= sizes[path]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _digest(folder: Path) -> str:
    """That of the files' names and bytes."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _DIGEST):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _is_whole(entry: Path) -> bool:
    """Whether the files are those that were written: neither a power cut nor a person cut them off."""
    note = entry / _DIGEST
    return note.is_file() and note.read_bytes() == _digest(entry).encode()
