"""A file or folder is written whole or not at all."""

import json

import pytest

from tensorpeft.reports.files import UNFINISHED, to_json, write_json, write_json_lines, write_lines, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def lines():
        yield "one"
        assert names(tmp_path) == ["rows.jsonl", "rows.jsonl.unfinished"]
        raise RuntimeError

    write_lines(tmp_path / "rows.jsonl", ["old"])
    with pytest.raises(RuntimeError):
        write_lines(tmp_path / "rows.jsonl", lines())
    assert names(tmp_path) == ["rows.jsonl"]
    assert (tmp_path / "rows.jsonl").read_text() == "old\n"
    write_lines(tmp_path / "rows.jsonl", ["new", "é"])
    assert (tmp_path / "rows.jsonl").read_bytes() == "new\né\n".encode()


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def write():
        with write_whole(tmp_path / "new" / "file") as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path / "new") == []


def test_a_folder_is_there_when_all_of_it_is(tmp_path):
    with write_whole(tmp_path / "base") as unfinished:
        unfinished.mkdir()
        (unfinished / "a").write_text("1")
        assert not (tmp_path / "base").exists()
    assert names(tmp_path) == ["base"]

    def fail():
        with write_whole(tmp_path / "other") as unfinished:
            unfinished.mkdir()
            (unfinished / "a").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == ["base"]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path):
    left = tmp_path / f"base{UNFINISHED}"
    left.mkdir()
    (left / "half").touch()
    (tmp_path / f"file{UNFINISHED}").write_text("half")
    with write_whole(tmp_path / "base") as unfinished:
        unfinished.mkdir()
    write_lines(tmp_path / "file", ["whole"])
    assert names(tmp_path) == ["base", "file"]
    assert names(tmp_path / "base") == []


def test_json_has_null_for_what_is_no_number(tmp_path):
    value = {"a": float("nan"), "b": [float("inf"), 0.5, "é"], 3: None, "path": tmp_path}
    assert to_json(value) == f'{{"a": null, "b": [null, 0.5, "é"], "3": null, "path": "{tmp_path}"}}'
    write_json(tmp_path / "new" / "a.json", value)
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8"))["b"] == [None, 0.5, "é"]
    write_json_lines(tmp_path / "rows.jsonl", ({"k": k} for k in range(2)))
    assert (tmp_path / "rows.jsonl").read_text() == '{"k": 0}\n{"k": 1}\n'
