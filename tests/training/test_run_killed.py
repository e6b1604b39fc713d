"""`tensorpeft train` with several seeds, killed at every phase: resumed, it leaves what an uninterrupted run leaves."""

import os
import pkgutil
import signal
import sys
from functools import partial

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
import forked
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.results import read_result
from tensorpeft.training.run import run_training

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a run is killed in a forked process")
more = partial(pytest.param, marks=pytest.mark.thorough)
# Where a run is killed, and at which call of that: two seeds, six steps each, a checkpoint every other one.
TRAINER, OURS = "transformers.Trainer.", "tensorpeft.training."
PHASES = [
    more(f"{TRAINER}training_step", 1, id="the first step"),
    more(f"{TRAINER}training_step", 4, id="a step after a checkpoint"),
    more("transformers.TrainerState.save_to_json", 2, id="a checkpoint, half-written"),
    more("transformers.trainer.rotate_checkpoints", 3, id="an old checkpoint to be removed"),
    more(f"{TRAINER}_load_best_model", 1, id="the best checkpoint to be loaded"),
    pytest.param(f"{TRAINER}evaluate", 4, id="the final evaluation"),
    more(f"{TRAINER}evaluate", 8, id="the final evaluation of the last seed"),
    more(f"{OURS}seed._save", 1, id="the adapter to be saved"),
    more(f"{OURS}seed.evaluate_task", 1, id="the test"),
    more(f"{OURS}seed.evaluate_task", 2, id="the test of the last seed"),
    more(f"{OURS}seed.write_json_lines", 2, id="the predictions"),
    more(f"{OURS}results.SeedResult.write", 1, id="the result"),
    more(f"{OURS}results.SeedResult.write", 2, id="the result of the last seed"),
    more(f"{TRAINER}training_step", 9, id="the second seed"),
    more(f"{OURS}run.write_report", 1, id="the report"),
    more(f"{OURS}report.save_figure", 1, id="the figure"),
    more(f"{OURS}report.write_lines", 1, id="the report's text"),
    more(f"{OURS}run.print_table", 1, id="the summary"),
    *(more("os.replace", k, id=f"file {k}, under its unfinished name") for k in range(1, 8)),
]


def train(place, output, resume=False):
    overrides = ["trainer.learning_rate=1e-2", "trainer.bf16=false", "trainer.gradient_checkpointing=false"]
    recipe = load_recipe(place / "sft.yaml", [*overrides, "seeds=[0,1]", f"output={output}"])
    return run_training(recipe, resume)


def kill_at(name, number, place, output):
    """Train in a process that kills itself at a call of a function."""
    process = forked.start(_train_until, name, number, place, output)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"it ended before call {number} of {name}"


def _train_until(name, number, place, output):
    owner, _, attribute = name.rpartition(".")
    owner, calls = pkgutil.resolve_name(owner), []
    function = getattr(owner, attribute)

    def counted(*arguments, **more):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)

    setattr(owner, attribute, counted)
    train(place, output)


def left(output):
    """What a run leaves, but for the times that it took."""
    paths = [path for path in output.rglob("*") if path.is_file() and "checkpoint" not in str(path)]
    kept = {path.relative_to(output): path for path in paths}
    found = {name: path.read_bytes() for name, path in kept.items() if name.name in _SAME or name.suffix == ".jsonl"}
    for result in (read_result(output / f"seed-{k}" / "results.json") for k in (0, 1)):
        curves = {key: result.curve(key) for key in ("loss", "eval_loss", "learning_rate")}
        found[result.seed] = curves, result.validation, result.tests, result.best_step, result.steps
    found["report"] = (output / "report.md").read_text(encoding="utf-8").replace(str(output), "OUTPUT")
    found["files"] = sorted(kept)
    return found


_SAME = ("adapter_model.safetensors", "tokenizer.json")  # not adapter_config.json: it has sets, of any order


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    train(place, output)
    return left(output)


@pytest.mark.parametrize(("function", "number"), PHASES)
def test_a_run_killed_at_any_phase_leaves_what_a_whole_run_leaves(function, number, place, whole, tmp_path):
    kill_at(function, number, place, tmp_path / "run")
    train(place, tmp_path / "run", resume=True)
    assert left(tmp_path / "run") == whole


def test_a_seed_that_measured_more_than_the_others_is_reported_with_what_all_measured(place, whole, tmp_path):
    train(place, tmp_path / "run")
    file = tmp_path / "run" / "seed-0" / "results.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"validation": {', '"validation": {"odd": 1.5,', 1), encoding="utf-8")
    assert "odd" in read_result(file).validation
    train(place, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8") == whole["report"].replace(
        "OUTPUT", str(tmp_path / "run")
    )
