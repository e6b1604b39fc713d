"""Two processes train as one does with a batch twice as large; `make recipes` runs these, `make test` does not."""

import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forked import Command
from tensorpeft.recipes import FOLDER
from tensorpeft.training.results import read_result

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TENSORPEFT_DATA", ROOT.parent / "shared"))
pytestmark = [
    pytest.mark.recipes,
    pytest.mark.skipif(not (DATA / "data").is_dir(), reason=f"no data in {DATA}; set TENSORPEFT_DATA"),
]
LORTA = ["adapter.method=lorta", "adapter.r=8", "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"]
METHODS = {"dota": [], "lorta": [*LORTA, "trainer.learning_rate=1e-2"]}
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
# On CPUs accelerate starts several processes with MPI only; torchrun, which it uses for GPUs, starts them here.
ACCELERATE_FSDP = ["accelerate.commands.launch", "--config_file", str(FOLDER / "accelerate/fsdp.yaml")]
ACCELERATE_FSDP += ["--main_process_port"]
FSDP_ON_CPU = str(Path(__file__).with_name("fsdp_on_cpu.py"))
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
# FSDP2, and who checkpoints activations: nobody, FSDP, or transformers.
SHARDED = [
    pytest.param("dota", TORCHRUN, [], id="dota"),
    pytest.param("dota", TORCHRUN, ["trainer.fsdp_config={activation_checkpointing: true}"], id="dota-by-fsdp"),
    pytest.param("lorta", ACCELERATE_FSDP, [], id="lorta-fsdp.yaml"),
    pytest.param("lorta", TORCHRUN, ["trainer.gradient_checkpointing=true"], id="lorta-by-transformers"),
]


@pytest.fixture(autouse=True)
def _data(monkeypatch):
    monkeypatch.setenv("TENSORPEFT_DATA", str(DATA))  # recipes name the folder


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def train(
    output: Path,
    batch_size: int,
    launcher: list[str],
    *overrides: str,
    program: str = "tensorpeft",
    recipe: str = "small/stories_sft",
):
    """The result of a small run, in one process or in those of a launcher."""
    words = ["train", recipe, "--smoke", f"output={output}", *overrides]
    words += [f"trainer.per_device_train_batch_size={batch_size}", "trainer.max_steps=6", "trainer.eval_steps=3"]
    printed = launch(*launcher, program, *words) if launcher else Command(output.with_suffix(".txt"), *words).finish()
    assert printed.count("Report, curves, adapters") == 1  # the main process alone speaks
    return read_result(output / "seed-0" / "results.json")


def launch(*words: str) -> str:
    """What a launcher and its processes print."""
    command, environment = [sys.executable, "-m", *words], os.environ | {"OMP_NUM_THREADS": "1"}
    pipe, errors = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, env=environment, stdout=pipe, stderr=errors, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    return done.stdout


def assert_same(two, one):
    assert dict(two.curve("loss")) == pytest.approx(dict(one.curve("loss")), abs=1e-5)
    assert dict(two.curve("eval_loss")) == pytest.approx(dict(one.curve("eval_loss")), abs=1e-5)
    assert two.tests["instructions"] == pytest.approx(one.tests["instructions"], rel=1e-5)
    assert dict(one.curve("loss"))[6] < dict(one.curve("loss"))[1]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_with_the_doubled_batch(method, checkpointing, tmp_path):
    more = [*METHODS[method], f"trainer.gradient_checkpointing={checkpointing}"]
    one = train(tmp_path / "one", 8, [], *more)
    two = train(tmp_path / "two", 4, [*TORCHRUN, free_port(), "-m"], *more)
    assert_same(two, one)


def test_two_processes_learn_labels_as_one_with_the_doubled_batch(tmp_path):
    """The mean over all rows, not its double; what clips a gradient tells the two apart."""
    more = ["model_arguments={hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}", "trainer.max_grad_norm=1e-3"]
    one = train(tmp_path / "one", 8, [], *more, recipe="small/minilm_glue")
    two = train(tmp_path / "two", 4, [*TORCHRUN, free_port(), "-m"], *more, recipe="small/minilm_glue")
    for curve in ("loss", "eval_loss", "grad_norm"):
        assert dict(two.curve(curve)) == pytest.approx(dict(one.curve(curve)), rel=1e-3), curve


def test_accelerate_launches_the_command(tmp_path):
    plain = train(tmp_path / "plain", 4, [], *METHODS["lorta"])
    launched = train(tmp_path / "launched", 4, ACCELERATE, *METHODS["lorta"])
    assert_same(launched, plain)


@pytest.mark.parametrize(("method", "launcher", "checkpointing"), SHARDED)
def test_two_sharded_processes_are_one_with_the_doubled_batch(method, launcher, checkpointing, tmp_path):
    """What is saved is the adapter that one process saves, up to rounding."""
    one = train(tmp_path / "one", 8, [], *METHODS[method])
    wanted = [] if launcher is ACCELERATE_FSDP else ["trainer.fsdp=true"]
    more = [*METHODS[method], *wanted, *checkpointing]
    two = train(tmp_path / "two", 4, [*launcher, free_port()], *more, program=FSDP_ON_CPU)
    assert_same(two, one)
    assert two.trained_parameters == one.trained_parameters
    first, second = (load_file(tmp_path / name / "seed-0/adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=1e-4, msg=key)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_a_step_with_zero3_is_that_of_one_process():
    command = [sys.executable, "-m", *TORCHRUN, free_port(), str(Path(__file__).with_name("zero3_step.py"))]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_sharding_is_refused(tmp_path):
    """Accelerate would train with a whole model in each process, and not say so."""
    command = [sys.executable, "-m", *TORCHRUN, free_port(), "-m", "tensorpeft", "train"]
    command += ["small/stories_sft", "--smoke", f"output={tmp_path}", "trainer.fsdp=true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "accelerate shards on GPUs alone" in done.stderr


def test_a_sharded_run_is_resumed(tmp_path):
    """In the middle, and where only the adapter and the tests were missing."""
    more = [*METHODS["dota"], "trainer.fsdp=true", "trainer.save_total_limit=2"]
    whole = train(tmp_path, 4, [*TORCHRUN, free_port()], *more, program=FSDP_ON_CPU)
    seed = tmp_path / "seed-0"
    for lost in ([], ["checkpoint-6"]):
        (seed / "results.json").unlink()
        for folder in ("adapter", *lost):
            shutil.rmtree(seed / folder)
        resumed = train(tmp_path, 4, [*TORCHRUN, free_port()], *more, "--resume", program=FSDP_ON_CPU)
        assert_same(resumed, whole)
        assert (seed / "adapter/adapter_model.safetensors").is_file()
