"""What runs cells: several workers, which die, are stopped, share cores and GPUs."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("rich")
pytest.importorskip("trl")
pytest.importorskip("psutil")
import psutil

from studies.compare.small_work import do, task, tries
from tensorpeft.studies.compare.engine import Engine, check_engine, one_gpu, open_engine, visible_gpus
from tensorpeft.studies.compare.slots import Here, LostCellError, StoppedError
from tensorpeft.studies.compare.workers import make_workers
from tensorpeft.training.progress import Progress

TESTS = Path(__file__).parents[2]


class Bar:
    """Remembers what it was told."""

    def __init__(self):
        self.told = []

    def tell(self, name, progress):
        self.told.append((name, progress))

    def end(self, name):
        self.told.append((name, 1))


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    paths = [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def make_tasks(folder, kinds):
    tasks = []
    for index, kind in enumerate(kinds):
        (folder / str(index)).mkdir()
        tasks.append(task(kind, folder / str(index)))
    return tasks


def is_gone(pid):
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_worker_that_dies_is_replaced_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    kinds = ["die once", "die", "answer", "answer", "exit"]
    tasks, bar = make_tasks(tmp_path, kinds), Bar()

    def run(task):
        try:
            return engine.run(task, bar)
        except LostCellError as error:
            return str(error)

    with open_engine(do, tmp_path / "logs", workers=2) as engine:
        once, always, first, second, left = engine.each(run, tasks)
    assert len(tries(tmp_path / "0")) == 2
    assert once.split() == [tries(tmp_path / "0")[1], "5"]
    assert len(tries(tmp_path / "1")) == 3
    assert "died 3 times, the last time by SIGKILL; where memory runs out, use fewer workers" in always
    assert [len(tries(tmp_path / name)) for name in "23"] == [1, 1]
    assert {first.split()[1], second.split()[1]} == {"5"}
    assert "died 3 times, the last time with exit code 3" in left
    log = Path(left.rpartition(" is in ")[2])
    assert "what it said last" in log.read_text()
    for answered in (tasks[0], tasks[2], tasks[3]):
        assert [progress for name, progress in bar.told if name == answered.name] == [Progress(), 0.5, 1]
    assert all(is_gone(pid) for index in range(5) for pid in tries(tmp_path / str(index)))


def test_an_interrupt_ends_the_workers_with_all_that_they_started(tmp_path):
    tasks = make_tasks(tmp_path, ["wait", "wait", "wait"])

    def interrupt():
        wait_for(lambda: len(list(tmp_path.glob("*/child"))) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    with open_engine(do, tmp_path / "logs", workers=2) as engine:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            engine.each(lambda task: engine.run(task, Bar()), tasks)
        begun = [path.parent for path in tmp_path.glob("*/child")]
        assert len(begun) == 2  # the third was never begun
        assert all(is_gone(tries(folder)[0]) for folder in begun)
        wait_for(lambda: all(is_gone((folder / "child").read_text()) for folder in begun), 5)
        with pytest.raises(StoppedError):
            engine.run(tasks[0], Bar())


def test_workers_die_with_the_process_that_started_them(tmp_path):
    (tmp_path / "0").mkdir()
    worker = make_workers(do, 1, [], tmp_path)[0]
    waiting = task("wait", tmp_path / "0")
    parent = multiprocessing.get_context("fork").Process(target=worker.run, args=(waiting, print))
    parent.start()
    wait_for((tmp_path / "0" / "child").is_file)
    parent.kill()
    parent.join()
    wait_for(lambda: is_gone(tries(tmp_path / "0")[0]) and is_gone((tmp_path / "0" / "child").read_text()), 5)


def test_workers_share_cores_and_take_gpus_in_turns(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    workers = make_workers(do, 3, ["4", "GPU-x"], tmp_path)
    assert [worker._environment["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["4", "GPU-x", "4"]
    assert {worker._environment["OMP_NUM_THREADS"] for worker in workers} == {"2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    (worker,) = make_workers(do, 1, [], tmp_path)
    assert worker._environment == {"OMP_NUM_THREADS": "5"}


def test_this_process_keeps_one_gpu_of_those_it_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    with one_gpu():
        assert visible_gpus() == ["2"]
    assert visible_gpus() == ["2", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with one_gpu():
        assert visible_gpus() == ["0"]
    assert visible_gpus() == ["0", "1"]


def test_one_slot_runs_in_order_in_this_thread_and_an_error_stops_all():
    threads = []
    engine = Engine([Here(lambda cell, on_share: "")])
    assert engine.each(lambda item: threads.append(threading.current_thread()) or item, [3, 1, 2]) == [3, 1, 2]
    assert set(threads) == {threading.main_thread()}

    stopped = threading.Event()

    class Slot:
        def run(self, cell, on_share):
            assert stopped.wait(60)
            raise StoppedError

        stop = stopped.set

    engine = Engine([Slot(), Slot()])

    def fail_beside_a_cell(name):
        if name == "bad":
            engine.each(int, ["1", "bad", "3"])
        return engine.run(task(name, Path()), Bar())

    with pytest.raises(ValueError, match="bad"):
        engine.each(fail_beside_a_cell, ["good", "bad", "good"])


@pytest.mark.parametrize(
    ("options", "message"), [((0, None), "expected at least 1"), ((2, ""), "one of them"), ((2, "auto"), "one of them")]
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_engine(*options)
