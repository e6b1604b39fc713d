"""A folder is whole or not there, and they are never more than was allowed, whoever dies when."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorpeft.serving.cache import BoundedCache


def writes(num_bytes: int, done: list[int] | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "weights").write_bytes(b"w" * num_bytes)
        (folder / "config").write_text("{}")
        if done is not None:
            done.append(num_bytes)

    return make


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def in_a_child(action: Callable[[], object]) -> int:
    """The exit status of a process that does it."""
    if (child := os.fork()) == 0:
        try:
            action()
        finally:
            os._exit(7)
    return os.waitpid(child, 0)[1]


def test_a_folder_is_made_once(tmp_path):
    done: list[int] = []
    cache = BoundedCache(tmp_path, 10_000)
    first = cache.find_or_make("a", writes(10, done))
    assert cache.find_or_make("a", writes(10, done)) == first == BoundedCache(tmp_path, 10_000).find_or_make("a", print)
    assert done == [10]
    assert {path.name for path in first.iterdir()} == {"weights", "config", ".digest"}


@pytest.mark.parametrize("damage", ["cut", "other", "gone", "more", "no digest", "empty"])
def test_a_half_written_folder_is_made_anew(damage, tmp_path):
    done: list[int] = []
    cache = BoundedCache(tmp_path, 10_000)
    folder = cache.find_or_make("a", writes(10, done))
    if damage == "cut":
        os.truncate(folder / "weights", 5)
    elif damage == "other":
        (folder / "weights").write_bytes(b"v" * 10)
    elif damage == "more":
        (folder / "more").write_text("")
    elif damage == "empty":
        for path in folder.iterdir():
            os.truncate(path, 0)
    else:
        (folder / ("weights" if damage == "gone" else ".digest")).unlink()
    assert cache.find_or_make("a", writes(10, done)) == folder
    assert done == [10, 10]
    assert (folder / "weights").read_bytes() == b"w" * 10
    assert not (folder / "more").exists()


def test_a_process_that_is_killed_in_the_middle_leaves_nothing_that_is_taken_for_a_folder(tmp_path):
    def die(folder: Path) -> None:
        (folder / "weights").write_bytes(b"w" * 5)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(lambda: BoundedCache(tmp_path, 10_000).find_or_make("a", die)) == signal.SIGKILL
    assert names(tmp_path) == {"a.unfinished"}
    cache = BoundedCache(tmp_path, 10_000)
    cache.find_or_make("b", writes(10))
    assert names(tmp_path) == {"b"}
    assert (cache.find_or_make("a", writes(10)) / "weights").read_bytes() == b"w" * 10


def test_an_error_in_the_middle_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "weights").write_bytes(b"w" * 5)
        raise OSError(28, "No space left on device")

    cache = BoundedCache(tmp_path, 10_000)
    with pytest.raises(OSError, match="No space left"):
        cache.find_or_make("a", fail)
    assert names(tmp_path) == set()


def test_those_used_longest_ago_make_room(tmp_path):
    def fill() -> None:
        cache = BoundedCache(tmp_path, 3_500)
        for k, key in enumerate("abc"):
            os.utime(cache.find_or_make(key, writes(1_000)), (k, k))
        cache.find_or_make("a", print)

    in_a_child(fill)
    assert names(tmp_path) == set("abc")
    BoundedCache(tmp_path, 3_500).find_or_make("d", writes(1_000))
    assert names(tmp_path) == set("acd")


def test_what_a_living_process_uses_is_kept(tmp_path):
    cache, other = BoundedCache(tmp_path, 2_500), BoundedCache(tmp_path, 2_500)
    cache.find_or_make("a", writes(1_000))
    other.find_or_make("b", writes(1_000))
    for each in (cache, other):
        with pytest.raises(OSError, match=r"2\.5e-06 GB that are allowed: 2 folders are in use"):
            each.find_or_make("c", writes(1_000))
        assert names(tmp_path) == {"a", "b"}
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(60)
        third = BoundedCache(tmp_path, 3_500)
        third.find_or_make("c", writes(1_000))
        os.write(writing, b".")
        signal.pause()
    try:
        os.read(reading, 1)
        with pytest.raises(OSError, match="3 folders are in use"):
            cache.find_or_make("d", writes(1_000))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    BoundedCache(tmp_path, 3_500).find_or_make("d", writes(1_000))
    assert names(tmp_path) == {"a", "b", "d"}


def test_what_a_process_uses_after_the_cache_was_cleared_is_kept(tmp_path):
    folder = tmp_path / "cache"
    cache = BoundedCache(folder, 1_500)
    cache.find_or_make("a", writes(1_000))
    shutil.rmtree(folder)
    cache.find_or_make("a", writes(1_000))
    with pytest.raises(OSError, match="1 folders are in use"):
        BoundedCache(folder, 1_500).find_or_make("b", writes(1_000))
    assert names(folder) == {"a"}


def test_a_folder_that_is_larger_than_all_is_refused(tmp_path):
    cache = BoundedCache(tmp_path, 500)
    with pytest.raises(OSError, match="allowed"):
        cache.find_or_make("a", writes(1_000))
    assert names(tmp_path) == set()
