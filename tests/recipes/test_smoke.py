"""Every recipe's small version on real data, whole and killed; `make recipes` runs them, `make test` does not."""

import json
import math
import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from forked import Command, kill
from tensorpeft.recipes import FOLDER
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.results import SeedResult, read_result

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TENSORPEFT_DATA", ROOT.parent / "shared"))


def has_its_own_small_version(path: Path) -> bool:
    """Not one that puts another model, of the paper's size, or a comparison on its parent."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    more = {*tree, *(tree.get("smoke") or {})} - {"inherits", "smoke", "description", "compare", "output"}
    return "inherits" not in tree or not more <= {"model"}


# Those of accelerate/ are no recipes, those of studies/ are one recipe, tested in test_compare.py.
RECIPES = [
    path
    for path in sorted(FOLDER.glob("*/*.yaml"))
    if path.parent.name not in ("accelerate", "studies") and has_its_own_small_version(path)
]
pytestmark = [
    pytest.mark.recipes,
    pytest.mark.skipif(not (DATA / "data").is_dir(), reason=f"no data in {DATA}; set TENSORPEFT_DATA"),
]
over_recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def start(recipe: Path, output: Path, *more: str) -> Command:
    """The command of a recipe's small version, in a process of its own; what it prints stands beside the output."""
    return Command(output.with_suffix(".txt"), "train", recipe, "--smoke", f"output={output}", *more)


def kill_after_a_checkpoint(process: BaseProcess, folder: Path) -> None:
    """SIGKILL at a random moment after the first checkpoint has begun to be written."""
    while process.exitcode is None and not list(folder.glob("checkpoint-*")):
        time.sleep(0.02)
    time.sleep(random.uniform(0, 2))
    kill(process)


def curve(result: SeedResult) -> dict[int, float]:
    return dict(result.curve("loss"))


@over_recipes
def test_a_recipe_runs_and_goes_on_where_it_was_killed(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORPEFT_DATA", str(DATA))  # recipes name the folder
    printed = start(recipe, tmp_path / "whole").finish()
    whole = read_result(tmp_path / "whole" / "seed-0" / "results.json")
    assert "Report, curves, adapters" in printed
    assert all(math.isfinite(loss) for loss in curve(whole).values())
    wanted = load_recipe(recipe, [f"output={tmp_path / 'whole'}"], smoke=True)
    assert max(curve(whole)) == wanted.trainer["max_steps"]
    if wanted.data.test is not None:
        assert whole.tests
        assert all(math.isfinite(value) for metrics in whole.tests.values() for value in metrics.values())
    report = (tmp_path / "whole" / "report.md").read_text(encoding="utf-8")
    assert wanted.to_yaml().strip() in report
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 10_000

    kill_after_a_checkpoint(start(recipe, tmp_path / "killed").process, tmp_path / "killed" / "seed-0")
    start(recipe, tmp_path / "killed", "--resume").finish()
    resumed = read_result(tmp_path / "killed" / "seed-0" / "results.json")
    assert curve(resumed) == pytest.approx(curve(whole), abs=1e-4)
    assert resumed.validation["loss"] == pytest.approx(whole.validation["loss"], abs=1e-4)
    assert json.dumps(resumed.tests) == json.dumps(whole.tests) or resumed.tests == {
        name: pytest.approx(metrics, abs=1e-3) for name, metrics in whole.tests.items()
    }
