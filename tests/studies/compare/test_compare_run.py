"""`tensorpeft compare` from the recipe to the report, on a tiny model: cells, failures, resuming, equal size."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
pytest.importorskip("psutil")
import psutil
from rich.console import Console

from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.studies.compare import cells, run
from tensorpeft.studies.compare.engine import Engine
from tensorpeft.studies.compare.entries import load_entries
from tensorpeft.studies.compare.progress import CellsBar
from tensorpeft.studies.compare.results import EntryResult, Run
from tensorpeft.studies.compare.run import run_compare
from tensorpeft.studies.compare.runner import Runner
from tensorpeft.studies.compare.slots import LostCellError
from tensorpeft.training.results import SeedResult
from tensorpeft.training.splits import load_splits
from tensorpeft_cli import main


def compare(place, output, rounds=2, workers=None, ray=None, **arguments):
    terminal = io.StringIO()
    comparison = load_entries(place / "some.yaml", output=output, **arguments)
    results = run_compare(comparison, rounds, "tensorpeft compare some.yaml", terminal, workers, ray)
    return results, terminal.getvalue()


def found_by(results):
    """All that the cells of a comparison found, without the parts of a failure that tell where it was."""
    runs = [(result.entry.key, run) for result in results for run in result.search + result.final]
    return [(key, run.rate, run.seed, without_timings(run.result), run.problem) for key, run in runs]


def without_timings(result):
    if result is None:
        return None
    timings = ("runtime", "per_second", "flos")
    history = [
        {key: value for key, value in entry.items() if not any(part in key for part in timings)}
        for entry in result.history
    ]
    return history, result.validation, result.best_step, result.tests, result.trained_parameters


def files_of(output):
    """The files of all cells, their locks included."""
    folder = output / "entries"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "costs.json"}


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """The results of all entries, what was printed, and the folder."""
    output = tmp_path_factory.mktemp("output") / "new"
    return *compare(place, output), output


def test_every_entry_has_its_cells_at_its_best_rate(finished):
    results, _, output = finished
    for result in results[:3]:
        assert [run.rate for run in result.search] == list(result.entry.rates)
        best = min(result.search, key=lambda run: run.loss)
        assert [(run.rate, run.seed) for run in result.final] == [(best.rate, 0), (best.rate, 1)]
        assert result.final[0].result.validation == best.result.validation
        assert all(set(run.result.tests["sst2"]) == {"accuracy", "loss"} for run in result.final)
        assert all(not run.result.tests for run in result.search)  # the test is scored once, after the choice
        assert result.saved_bytes > 0
        assert not list((output / "entries" / result.entry.key).rglob("checkpoint-*"))
    losers = [run.rate for run in results[0].search if run.rate != results[0].rate]
    assert not (output / "entries" / "full" / f"rate-{losers[0]:g}" / "seed-0" / "model").exists()


def test_costs_are_measured_beside_the_reference(finished):
    full, lora, lorta, _ = finished[0]
    assert lora.costs.ratio == 1.0
    for result in (full, lora, lorta):
        assert result.costs.head_parameters == 24 * 2 + 2
        assert result.costs.step_seconds > 0
        assert result.costs.ratio > 0
        assert result.costs.peak_bytes > 0
    assert lora.costs.parameters == 2 * 3 * 2 * (24 + 24)
    assert lorta.final[0].result.trained_parameters == lorta.costs.parameters + 50
    assert full.saved_bytes > lora.saved_bytes


def test_what_fails_is_shown_as_failed_and_the_others_go_on(finished):
    results, printed, output = finished
    assert "NoMatchingPeftModuleError" in results[3].problem
    assert re.search(r"broken +failed", printed)
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "| broken | failed |" in report
    tree = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [entry["key"] for entry in tree["entries"]] == ["full", "lora", "lorta", "broken"]
    assert tree["entries"][3]["chosen_rate"] is None
    assert tree["entries"][1]["final"][1]["tests"]["sst2"]["accuracy"] >= 0


def test_the_table_fits_and_has_what_was_found(finished):
    results, printed, _ = finished
    assert max(map(len, printed.splitlines())) <= 110
    for result in results[:3]:
        (row,) = [line for line in printed.splitlines() if re.match(rf" *{result.entry.label} +\d", line)]
        assert f"{result.costs.parameters:,}" in row
        assert f"{result.rate:g}" in row


def test_the_window_of_rates_is_told(finished):
    results, _, output = finished
    report = (
        (output / "report.md").read_text(encoding="utf-8").partition("Window of learning rates")[2].partition("##")[0]
    )
    entries = json.loads((output / "results.json").read_text(encoding="utf-8"))["entries"]
    for result, entry in zip(results[:3], entries):
        (row,) = [line for line in report.splitlines() if line.startswith(f"| {result.entry.label} | ")]
        low, best, high = (entry["rate_window"]["low"], result.rate, entry["rate_window"]["high"])
        assert low <= best <= high
        assert f"{low:.1e} |" in row
        assert f"{high:.1e} |" in row
        assert ("≤" in row) == entry["rate_window"]["low_is_open"]
    assert results[3].window is None


def test_the_html_needs_no_network_and_escapes_what_it_shows(finished):
    page = (finished[2] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "@import" not in page
    assert "url(" not in page
    assert page.count("data:image/png;base64,iVBOR") == 2
    assert "a &lt;note&gt;" in page
    assert "a <note>" not in page
    assert "tensorpeft compare some.yaml" in page
    for result in finished[0]:
        assert result.entry.label in page


def test_called_again_nothing_that_is_finished_runs_again(place, finished, monkeypatch, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(finished[2], output)
    shutil.rmtree(output / "entries" / "lora" / f"rate-{finished[0][1].rate:g}" / "seed-1")
    trained = []
    run_seed = cells.run_seed

    def counted(recipe, splits, arguments, *more):
        if not (output / arguments.output_dir / "results.json").is_file():
            trained.append(arguments.output_dir)
        return run_seed(recipe, splits, arguments, *more)

    monkeypatch.setattr(cells, "run_seed", counted)
    results, printed = compare(place, output)
    assert [path for path in trained if "broken" not in path] == [
        str(output / "entries" / "lora" / f"rate-{results[1].rate:g}" / "seed-1")
    ]
    for before, after in zip(finished[0], results):
        assert [run.loss for run in after.final] == pytest.approx([run.loss for run in before.final])
    assert re.search(r"broken +failed", printed)


@pytest.mark.slow
def test_workers_give_the_cells_of_the_serial_run_though_one_is_killed_in_the_middle(
    place, finished, monkeypatch, tmp_path
):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    killed = kill_a_worker()
    results, printed = compare(place, tmp_path / "run", 0, workers=2)
    assert len(killed) == 1
    assert not psutil.Process().children()
    assert found_by(results) == found_by(finished[0])
    assert files_of(tmp_path / "run") == files_of(finished[2])
    assert re.search(r"broken +failed", printed)


def kill_a_worker():
    """Kill a process that this one will start, as soon as one trains; the list that its id will be in."""
    killed = []

    def trains(worker):
        try:
            locks = [Path(file.path) for file in worker.open_files() if file.path.endswith("/.lock")]
        except psutil.Error:
            return False
        # Any process, until it has become another program, holds what the one that starts it holds: the folder's lock.
        cells = [lock.parent for lock in locks if "entries" in lock.parts and "broken" not in lock.parts]
        return any(not (cell / "results.json").exists() for cell in cells)

    def kill_one_that_trains():
        while not killed:
            time.sleep(0.01)
            for worker in filter(trains, psutil.Process().children(recursive=True)):
                # Suspended, it neither ends its cell nor begins another one between the question and the kill.
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.suspend()
                    if trains(worker):
                        worker.kill()
                        killed.append(worker.pid)
                        return
                    worker.resume()

    threading.Thread(target=kill_one_that_trains, daemon=True).start()
    return killed


@pytest.mark.thorough
def test_ray_gives_the_cells_of_the_serial_run_though_a_process_is_killed_in_the_middle(
    place, finished, monkeypatch, tmp_path, capfd
):
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    paths = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.chdir(tmp_path)
    killed = kill_a_worker()
    results, _ = compare(place, Path("run"), 0, ray="")
    assert len(killed) == 1
    assert found_by(results) == found_by(finished[0])
    assert files_of(tmp_path / "run") == files_of(finished[2])
    printed, errors = capfd.readouterr()
    assert errors == ""
    assert all("(raylet)" in line for line in printed.splitlines())  # Ray's own word on the one that was killed


def test_what_fails_keeps_its_traceback_until_it_succeeds(place, monkeypatch, tmp_path, capsys):
    output = tmp_path / "run"
    command = ["compare", str(place / "some.yaml"), "--methods", "lora", "--output", str(output)]
    command += ["--timing-rounds", "0"]
    fail_at = [(1, "run_seed"), (0, "score_seed")]

    def failing(name, function):
        def run(recipe, splits, arguments, *more):
            if (arguments.seed, name) in fail_at:
                raise RuntimeError(f"{name} broke\nin two lines")
            return function(recipe, splits, arguments, *more)

        return run

    for name in ("run_seed", "score_seed"):
        monkeypatch.setattr(cells, name, failing(name, getattr(cells, name)))
    assert main(command) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"LoRA r=2: test: RuntimeError: score_seed broke \(entries/lora/rate-\S+/seed-0/failure.txt\)", printed
    )
    failures = sorted(output.rglob("failure.txt"), key=lambda path: path.parent.name)
    assert [path.parent.name for path in failures] == ["seed-0", "seed-1"]
    for path, broke in zip(failures, ("score_seed", "run_seed")):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("Traceback")
        assert f"{broke} broke\nin two lines" in text
    fail_at.pop()
    assert main(command) == 1  # the other final run fails still
    printed = " ".join(capsys.readouterr().out.split())
    assert "LoRA r=2: 1 of 2 final runs failed: RuntimeError: run_seed broke (entries" in printed
    fail_at.clear()
    assert main(command) == 0
    assert not list(output.rglob("failure.txt"))


def test_a_cell_whose_process_dies_each_time_is_a_failed_one(place, finished, monkeypatch, tmp_path):
    def run_cell(cell, on_share):
        if "lorta" in str(cell.folder):
            raise LostCellError("its process was ended by SIGKILL, 3 times")
        return cells.run_cell(cell, on_share)

    monkeypatch.setattr("tensorpeft.studies.compare.run.run_cell", run_cell)
    (lora, lorta), _ = compare(place, tmp_path / "run", 0, methods="lora,lorta", seeds=1)
    assert not lora.has_failed
    assert lorta.has_failed
    assert lorta.problem == "its process was ended by SIGKILL, 3 times (entries/lorta/rate-0.001/seed-0/failure.txt)"
    failure = tmp_path / "run" / "entries" / "lorta" / "rate-0.001" / "seed-0" / "failure.txt"
    assert "SIGKILL" in failure.read_text(encoding="utf-8")


def test_a_folder_that_other_machines_do_not_see_is_named(place, monkeypatch, tmp_path):
    monkeypatch.setattr("tensorpeft.studies.compare.run.run_cell", lambda cell, on_share: "")
    (lora,), _ = compare(place, tmp_path / "run", 0, methods="lora")
    assert "left nothing here: cells on several machines need one output folder that all see" in lora.problem
    cell = cells.Cell("train", "a cell", lora.entry.recipe, 0, tmp_path / "elsewhere", None)
    assert re.match(r"no folder .*elsewhere on .*: cells on several machines need", cells.run_cell(cell, print))


def test_a_mode_that_suits_no_test_is_refused_before_anything_is_trained(asked, tmp_path):
    comparison = load_entries(asked / "asked.yaml", "lora", 1, ["evaluate.mode=likelihood"], output=tmp_path / "run")
    with pytest.raises(ValueError, match=r"0 choices .* Use mode generate or loss"):
        run_compare(comparison, 0, terminal=io.StringIO())
    assert not (tmp_path / "run" / "entries").exists()


@pytest.mark.parametrize("last", ["lora", "lorta"])
def test_tests_of_preferences_have_the_recipes_beta(asked, tmp_path, last):
    pair = {"prompt": "one", "chosen": " two", "rejected": " three"}
    (tmp_path / "pairs.jsonl").write_text(10 * f"{json.dumps(pair)}\n", encoding="utf-8")
    rows = {name: str(tmp_path / "pairs.jsonl") for name in ("train", "validation", "test")}
    overrides = ["task=preferences", "evaluate=null", "trainer.beta=0.2", "compare.methods.lora.trainer.beta=0.5"]
    overrides += [f"data.{name}={path}" for name, path in rows.items()]
    methods = ",".join(sorted(("lora", "lorta"), key=last.__eq__))
    comparison = load_entries(asked / "asked.yaml", methods, 1, overrides, output=tmp_path / "run")
    assert run._check_entries(comparison, load_splits(comparison.recipe)).beta == 0.2


def test_what_comes_next_is_done_with_the_best_run_that_finished(asked, tmp_path):
    comparison = load_entries(asked / "asked.yaml", "lora", 3, output=tmp_path)
    (entry,) = comparison.entries
    losses = (None, 1.0, 0.5)
    results = [None if x is None else SeedResult(0, (), {"loss": x}, None, 1, {}, 1, 1) for x in losses]
    final = tuple(Run(1e-2, seed, result) for seed, result in enumerate(results))
    runner = Runner(comparison, True, EvaluationOptions(), Engine([]), CellsBar(Console(quiet=True), 1))
    lines = run._next_commands([EntryResult(entry, (), final, None)], runner)
    assert f"  tensorpeft chat {tmp_path}/entries/lora/rate-0.01/seed-2/adapter" in lines


def test_cells_of_another_recipe_are_not_taken_for_ones_own(place, finished):
    with pytest.raises(ValueError, match="max_steps"):
        compare(place, finished[2], overrides=["trainer.max_steps=6"])


def test_cells_of_another_recipe_at_another_rate_are_refused_too(place, finished):
    other = ["trainer.per_device_train_batch_size=2", "compare.methods.lora.rates=[1e-4]"]
    with pytest.raises(ValueError, match=r"rate-0\.001.*per_device_train_batch_size"):
        compare(place, finished[2], methods="lora", overrides=other)


def test_cells_of_other_rows_stand_in_no_table_with_those_of_these(place, finished, monkeypatch, tmp_path):
    output, rows = tmp_path / "copy", place / "labels.tsv"
    shutil.copytree(finished[2], output)
    assert json.loads((output / "entries/lora/rate-0.01/rows.json").read_text(encoding="utf-8")).keys() >= {"train"}
    monkeypatch.setattr("tensorpeft.studies.compare.table.find_versions", lambda: {"torch": "a later one"})
    _, printed = compare(place, output, methods="lora")
    assert re.search(r"Versions differ: torch \S+ \(LoRA r=2\), a later one \(this report\)", " ".join(printed.split()))
    text = rows.read_text(encoding="utf-8")
    try:
        rows.write_text(text.replace("\t0\n", "\t1\n"), encoding="utf-8")
        with pytest.raises(ValueError, match=r"data.\w+ \(.*\): the rows of .* are others than .* pass another folder"):
            compare(place, output, methods="lora")
        for file in output.rglob("rows.json"):  # of a folder that is older than this record
            file.unlink()
        compare(place, output, methods="lora")
    finally:
        rows.write_text(text, encoding="utf-8")


def test_an_edge_that_is_the_best_is_gone_beyond(place, tmp_path):
    arguments = {"methods": "lorta", "overrides": ["compare.widenings=1", "compare.methods.lorta.rates=[1e-6,1e-5]"]}
    (result,), _ = compare(place, tmp_path / "run", **arguments)
    assert len(result.search) == 3
    assert result.search[0].rate < 1e-6 or result.search[-1].rate > 1e-5


def test_one_rate_is_no_grid_to_go_beyond(place, tmp_path):
    comparison = load_entries(place / "some.yaml", "lorta", 1, ["compare.widenings=1"], output=tmp_path / "run")
    entry = dataclasses.replace(comparison.entries[0], rates=(1e-3,))
    (result,) = run_compare(dataclasses.replace(comparison, entries=(entry,)), 0, terminal=io.StringIO())
    assert [run.rate for run in result.search] == [run.rate for run in result.final] == [1e-3]
    assert not result.has_failed


def test_a_cell_waits_for_whoever_runs_it(place, monkeypatch, tmp_path):
    recipe = load_entries(place / "some.yaml").recipe
    ran = threading.Event()
    monkeypatch.setattr(cells, "run_seed", lambda *arguments: ran.set())
    cell = cells.Cell("train", "a cell", recipe, 0, tmp_path, EvaluationOptions())
    with FileLock(tmp_path / ".lock"):
        waiting = threading.Thread(target=cells.run_cell, args=(cell, print))
        waiting.start()
        assert not ran.wait(0.5)
    waiting.join(60)
    assert ran.is_set()


def test_equal_size_sets_the_ranks(place, tmp_path):
    results, printed = compare(place, tmp_path / "run", methods="lora,lorta", budget=700, seeds=1)
    lora, lorta = results
    assert lora.costs.parameters == 576  # r = 2; 864 at r = 3 is further off
    assert lorta.costs.parameters == pytest.approx(700, abs=20)
    assert lorta.entry.label == f"LoRTA r={lorta.entry.recipe.adapter['r']}"
    assert "700 trained parameters" in printed


def test_the_command_names_what_is_wrong_in_one_line(place, capsys, tmp_path):
    assert main(["compare", str(place / "some.yaml"), "--methods", "lortaa"]) == 2
    assert "Did you mean lorta" in capsys.readouterr().err
    assert main(["compare", str(place / "none.yaml")]) == 2
    assert "no recipe" in capsys.readouterr().err
    out = ["--output", str(tmp_path / "run")]
    assert main(["compare", str(place / "some.yaml"), "model=nowhere", "--methods", "lora", *out]) == 2
    assert "nowhere: no folder of that name" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["compare", str(place / "some.yaml"), "--timing-rounds", "-1"]) == 2
    assert main(["compare", str(place / "some.yaml"), "--workers", "0"]) == 2
    assert main(["compare", str(place / "some.yaml"), "--workers", "2", "--ray"]) == 2
    assert "not allowed with argument --workers" in capsys.readouterr().err
    assert main(["compare", str(place / "some.yaml"), "--ray", "compare.seeds=none"]) == 2  # no address
    assert "seeds='none'" in capsys.readouterr().err
