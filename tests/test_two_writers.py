"""A second command on a folder that another writes to: refused at once, in one line, and nothing is changed."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from commanded import fill
from tensorpeft.reports.folders import sole_writer
from tensorpeft_cli import main

COMMANDS = {
    "train": ("train", "recipe.yaml", "output=out"),
    "train, resumed": ("train", "recipe.yaml", "output=out", "--resume"),
    "compare": ("compare", "recipe.yaml", "--output", "out"),
    "compare with workers": ("compare", "recipe.yaml", "--output", "out", "--workers", "2"),
    "evaluate": ("evaluate", "adapter", "--task", "lines", "--data", "rows", "--output", "out"),
    "evaluate, lm-eval": ("evaluate", "adapter", "--lm-eval", "piqa", "--output", "out"),
    "evaluate, MT-Bench": ("evaluate", "adapter", "--mt-bench", "questions.jsonl", "--output", "out"),
    "inspect bonds": ("inspect", "bonds", "base", "--output", "out"),
    "inspect quantization": ("inspect", "quantization", "base", "--output", "out"),
    "inspect update": ("inspect", "update", "recipe.yaml", "--output", "out"),
    "quantize": ("quantize", "base", "out"),
    "export lora": ("export", "lora", "adapter", "out"),
    "export dense": ("export", "dense", "adapter", "out"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, an adapter, a recipe and questions."""
    folder = fill(tmp_path_factory.mktemp("written"))
    turns = {"question_id": 1, "category": "writing", "turns": ["one", "two"]}
    (folder / "questions.jsonl").write_text(json.dumps(turns) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_the_second_command_is_refused_at_once(words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    with sole_writer(Path("out")):
        before = os.listdir("out")
        assert main(list(words)) == 2
        assert os.listdir("out") == before
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("tensorpeft: out: another process is writing to this folder")
    assert not Path("out").exists()
