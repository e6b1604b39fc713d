"""Commands killed at random moments, again and again: at last they leave the bytes of an uninterrupted command."""

import json
import os
import random
import shutil
import signal
import sys
import time

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("rich")
pytest.importorskip("trl")
import forked
from commanded import fill
from tensorpeft_cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # minutes, where nothing else runs
    pytest.mark.skipif(sys.platform == "win32", reason="a command is killed in a forked process"),
]
STEPS = ["trainer.max_steps=6", "trainer.eval_steps=2", "trainer.learning_rate=1e-2"]
FEW = ["--timing-rounds", "0", "compare.widenings=0", "compare.methods.lotr.rates=[1e-3,1e-2]"]  # three cells
COMMANDS = {
    "train": ["train", "recipe.yaml", "seeds=[0,1,2]", "--resume", *STEPS],
    "compare": ["compare", "recipe.yaml", "--output", "out", "--methods", "lora,lotr", *FEW, *STEPS],
    "quantize": ["quantize", "base", "out", "--r", "4", "--num-cores", "3"],
    "export dense": ["export", "dense", "adapter", "out"],
    "export lora": ["export", "lora", "adapter", "out"],
}
TIMES = {"train": 12, "compare": 4, "quantize": 4, "export dense": 4, "export lora": 4}
# What of JSON says how long something took, or counts what one process did.
UNEQUAL = ("runtime", "per_second", "flos", "train_loss", "num_tokens", "epoch")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "times", [pytest.param(1, marks=pytest.mark.thorough), pytest.param(4, marks=pytest.mark.soak)]
)
def test_a_command_killed_at_random_moments_leaves_the_same_bytes_at_last(command, times, tmp_path):
    words = COMMANDS[command]
    if "quantize" in words:
        pytest.importorskip("bitsandbytes")
    (tmp_path / "whole").mkdir()
    fill(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    run(["recipes"], tmp_path)  # the first process waits for the imports
    draw, start = random.Random(f"{times} {words}"), time.monotonic()
    assert run(words, tmp_path / "whole") == 0
    seconds, killed = time.monotonic() - start, 0
    while killed < times * TIMES[command]:
        code = run(words, tmp_path / "killed", draw.uniform(0, seconds))
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            assert left(tmp_path / "killed" / "out") == left(tmp_path / "whole" / "out")
            shutil.rmtree(tmp_path / "killed" / "out")
    assert run(words, tmp_path / "killed") == 0
    assert left(tmp_path / "killed" / "out") == left(tmp_path / "whole" / "out")


def run(words, folder, seconds=600.0):
    """The exit code of a command in a process of its own, killed after so many seconds."""
    process = forked.start(_run, words, folder)
    process.join(seconds)
    forked.kill(process)
    return process.exitcode


def _run(words, folder):
    os.chdir(folder)
    from tensorpeft.quantization import streamed

    streamed._SHARD_BYTES = 2**12  # several shards of a tiny model
    with open("printed.txt", "a", encoding="utf-8") as sys.stdout:
        sys.stderr = sys.stdout
        sys.exit(main(words))


def left(folder):
    """The bytes of every file but figures; of JSON, all but times."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    kept = {name: path for name, path in files.items() if "checkpoint-" not in name and path.suffix != ".png"}
    return {name: _content(path) for name, path in kept.items() if path.suffix != ".html" and path.name != ".lock"}


def _content(path):
    if path.suffix != ".json":
        return path.read_bytes()
    return _timeless(json.loads(path.read_text(encoding="utf-8")))


def _timeless(tree):
    if isinstance(tree, dict):
        return {key: _timeless(part) for key, part in tree.items() if not any(time in key for time in UNEQUAL)}
    if isinstance(tree, list):
        parts = map(_timeless, tree)
        return [part for part in parts if not (isinstance(part, dict) and part.keys() <= {"step"})]
    return tree
