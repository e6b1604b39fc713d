"""Folders that one command at a time writes, and results whose files change together."""

import os
import signal
import subprocess
import sys

import pytest

from tensorpeft.reports.folders import LOCK, replace_files, sole_writer

HOLD = (
    "import sys, time; from pathlib import Path; from tensorpeft.reports.folders import sole_writer\n"
    "with sole_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def owner(tmp_path):
    """Another process that writes to the folder run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_a_folder_has_one_writer_until_that_ends_or_is_killed(owner, tmp_path):
    with pytest.raises(BlockingIOError, match="another process is writing"), sole_writer(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK).is_file()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with sole_writer(tmp_path / "run"):
        with pytest.raises(BlockingIOError), sole_writer(tmp_path / "run"):
            pass
        (tmp_path / "run" / "result").touch()
    assert os.listdir(tmp_path / "run") == ["result"]


def test_a_writer_that_wrote_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="x"), sole_writer(tmp_path / "a" / "b"):
        raise ValueError("x")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("parts", [("file",), ("file", "run")], ids="/".join)
def test_a_file_in_the_folder_s_place(parts, tmp_path):
    (tmp_path / "file").touch()
    message = r"file is a file; expected a folder, or a name that is free"
    with pytest.raises(FileExistsError, match=message), sole_writer(tmp_path.joinpath(*parts)):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_files_of_a_result_replace_those_of_another_together_or_not_at_all(tmp_path):
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "notes.txt"):
        (tmp_path / name).write_text("old")

    def write(fail):
        with replace_files(tmp_path, "config.json", ["model*.safetensors"]) as unfinished:
            for name in ("config.json", "model.safetensors"):
                (unfinished / name).write_text("new")
            if fail:
                raise OSError("the disk is full")

    def found():
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    before = found()
    with pytest.raises(OSError, match="full"):
        write(fail=True)
    assert found() == before
    write(fail=False)
    assert found() == {"config.json": "new", "model.safetensors": "new", "notes.txt": "old"}


def test_a_kill_between_two_files_leaves_no_result(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("old")
    moved = []

    def replace(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(os.rename(source, target))

    monkeypatch.setattr(os, "replace", replace)

    def write():
        with replace_files(tmp_path, "config.json") as unfinished:
            for name in ("config.json", "model.safetensors"):
                (unfinished / name).write_text("new")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == ["model.safetensors"]
