import threading
import time
from pathlib import Path

import pytest

from tensorpeft.loading.cache import find_or_make


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TENSORPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/models"


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").write_text("x")
    return tmp_path / "source"


def make(unfinished: Path) -> None:
    assert not list(unfinished.iterdir())
    (unfinished / "weights").write_text("whole")


def test_what_fails_leaves_nothing(source, folder):
    def fail(unfinished):
        make(unfinished)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_or_make([source], "a", "1", fail)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed(source, folder):
    found = find_or_make([source], "a", "1", make)
    assert (found / "weights").read_text() == "whole"
    found.rename(found.with_name(f"{found.name}.unfinished"))
    again = find_or_make([source], "a", "1", make)
    assert again == found
    assert sorted(path.name for path in folder.iterdir()) == [f".{found.name}.lock", found.name]
    assert [path.name for path in found.iterdir()] == ["weights"]


def test_several_at_once_make_it_once(source):
    made, found = [], []

    def slowly(unfinished):
        made.append(unfinished)
        time.sleep(0.2)
        make(unfinished)

    threads = [
        threading.Thread(target=lambda: found.append(find_or_make([source], "a", "1", slowly))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(found) == 4
    assert {(path / "weights").read_text() for path in found} == {"whole"}
