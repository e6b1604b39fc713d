"""`tensorpeft compare` with workers, interrupted and killed: no process is left, no finished cell is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("rich")
pytest.importorskip("trl")
pytest.importorskip("psutil")
import psutil

pytestmark = pytest.mark.thorough


def start(place, output, engine):
    command = [sys.executable, "-m", "tensorpeft", "compare", str(place / "some.yaml"), "--output", str(output)]
    command += ["--methods", "full,lora,lorta", "--timing-rounds", "0", *engine]
    command += ["trainer.max_steps=150", "trainer.eval_steps=50"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished_cells(output):
    return {path: path.stat().st_mtime_ns for path in output.rglob("rate-*/seed-*/results.json")}


def cells_in_the_middle(output):
    return list(output.rglob("rate-*/seed-*/checkpoint-*/trainer_state.json"))


def end(process, output, number, at_least):
    """Send a signal in the middle of a cell, once so many are finished; what was finished."""
    while len(finished_cells(output)) < at_least or not cells_in_the_middle(output):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.send_signal(number)
    process.wait(20)
    _, alive = psutil.wait_procs(family, 5)
    # Ray's own agents, which run no cell, may outlive a command that is killed.
    assert not [other for other in alive if number == signal.SIGINT or not other.name().endswith("Agent")]
    return finished_cells(output)


@pytest.mark.parametrize("engine", [("--workers", "2"), ("--ray",)], ids=["workers", "ray"])
def test_a_command_that_is_interrupted_or_killed_leaves_no_process_and_goes_on(place, tmp_path, engine):
    if "--ray" in engine:
        pytest.importorskip("ray")
    output = tmp_path / "run"
    before = end(start(place, output, engine), output, signal.SIGINT, at_least=1)
    between = end(start(place, output, engine), output, signal.SIGKILL, at_least=len(before) + 1)
    last = start(place, output, engine)
    printed, _ = last.communicate(timeout=600)
    assert last.returncode == 0, printed
    tree = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [len(entry["final"]) for entry in tree["entries"]] == [2, 2, 2]
    after = finished_cells(output)
    # A cell that is chosen is written once more, with its tests.
    chosen = 3
    assert len([path for path in between if after[path] != between[path]]) <= chosen
    assert len([path for path in before if between[path] != before[path]]) <= chosen
