"""A checkpoint on disk becomes the base that `quantize_residual` makes in memory, in pieces, whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

pytest.importorskip("bitsandbytes")

from cases import MODELS, Model, logits, over_models, tiny_llama, tokens
from tensorpeft import DotaConfig, LortaConfig
from tensorpeft.quantization import dequantize, quantize_checkpoint, quantize_residual, streamed


def config_of(model: Model) -> DotaConfig:
    return DotaConfig(r=6, num_cores=3, target_modules=model.targets, task_type=model.task_type)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of a few kilobytes, so that tiny models have several."""
    monkeypatch.setattr(streamed, "_SHARD_BYTES", 4096)


@over_models
@pytest.mark.parametrize("rounds", [1, 3])
def test_streamed_is_what_memory_makes(model: Model, rounds: int, tmp_path, small_shards):
    model.fresh().save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", config_of(model), rounds=rounds)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    loaded = type(model.fresh()).from_pretrained(tmp_path / "out").eval()
    expected = quantize_residual(model.fresh(), config_of(model), rounds=rounds)
    assert torch.equal(logits(loaded), logits(expected))
    state, expected_state = loaded.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[key], expected_state[key]) for key in state)


def test_a_base_model_and_one_with_a_head_share_a_checkpoint(tmp_path):
    """The base model's checkpoint lacks the prefix that the model with a head has."""
    model = MODELS[2]
    model.fresh().base_model.save_pretrained(tmp_path / "source")
    targets = {"target_modules": model.targets, "r": 6, "num_cores": 3}
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", DotaConfig(**targets))
    with_head = type(model.fresh()).from_pretrained(tmp_path / "out")
    base = type(model.fresh().base_model).from_pretrained(tmp_path / "out")
    names = {name.removeprefix("bert.") for name, module in with_head.named_modules() if hasattr(module, "start")}
    assert names == {name for name, module in base.named_modules() if hasattr(module, "start")}
    assert len(names) == 6


def test_bfloat16_stays_bfloat16_and_cores_are_float32(tmp_path):
    model = MODELS[0]
    model.fresh().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", config_of(model))
    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", framework="pt") as file:
        dtypes = {key.rpartition(".")[2]: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes["core_1"] == torch.float32
    loaded = type(model.fresh()).from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16


def test_what_transformers_keeps_in_float32_stays_as_it_is(tmp_path):
    """T5 casts the input of `wo` to the dtype of its weight."""

    def config(*targets: str) -> DotaConfig:
        return DotaConfig(r=6, num_cores=3, target_modules=list(targets))

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 24, "d_kv": 6, "d_ff": 44, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", config("q", "v"))
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    in_memory = T5ForConditionalGeneration.from_pretrained(tmp_path / "source").eval()
    for base in (quantize_residual(in_memory, config("q", "v")), loaded):
        layer = base.encoder.block[0].layer[1].DenseReluDense
        assert (type(layer.wo), hasattr(layer.wi, "weight") and layer.wi.weight.dtype) == (nn.Linear, torch.uint8)
        expected = logits(base, decoder_input_ids=tokens())
        torch.testing.assert_close(logits(dequantize(base), decoder_input_ids=tokens()), expected)
    half = T5ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert half.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"DenseReluDense.wo: transformers keeps \['wo'\] of this model out of 4 bits"):
        quantize_residual(plain, config("q", "wo"))


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path, small_shards, monkeypatch):
    model = MODELS[0]
    model.fresh().save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "whole", config_of(model))
    convert, calls = streamed._convert, []

    def failing(job, *arguments):
        calls.append(job.key)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return convert(job, *arguments)

    monkeypatch.setattr(streamed, "_convert", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "source", tmp_path / "cut", config_of(model))
    done = {path.name for path in (tmp_path / "cut").glob("*.safetensors")}
    assert done
    assert not (tmp_path / "cut" / "config.json").exists()  # nobody takes it for a model
    quantize_checkpoint(tmp_path / "source", tmp_path / "cut", config_of(model))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(calls) < 12 + len(load_file(tmp_path / "source" / "model.safetensors"))  # complete shards were kept


@pytest.mark.thorough
def test_a_killed_process_leaves_what_the_next_one_finishes(tmp_path):
    """SIGKILL at a moment when some shards are complete."""
    source = tmp_path / "source"
    tiny_llama(hidden_size=256, intermediate_size=704, num_hidden_layers=16).save_pretrained(source)
    script = (
        "import sys, tensorpeft.quantization.streamed as streamed; streamed._SHARD_BYTES = 2**20\n"
        "from tensorpeft_cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def start(out: str) -> subprocess.Popen:
        arguments = ["quantize", str(source), str(tmp_path / out), "--target-modules", "all-linear"]
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    killed = start("cut")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("*.safetensors")) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it ended before it could be killed: make the model larger"
    for out in ("cut", "whole"):
        process = start(out)
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_other_arguments_do_not_continue_a_run(tmp_path, small_shards, monkeypatch):
    model = MODELS[0]
    model.fresh().save_pretrained(tmp_path / "source")
    monkeypatch.setattr(streamed, "_finish", lambda *arguments: None)  # as if killed before the end
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", config_of(model))
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="other arguments"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", config_of(model), rounds=2)
    os.utime(tmp_path / "source" / "model.safetensors", (0, 0))
    with pytest.raises(ValueError, match="has changed since"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", config_of(model))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda source: (source / "config.json").unlink(), FileNotFoundError, "no config.json"),
        (lambda source: (source / "model.safetensors").unlink(), FileNotFoundError, "pickle .* never loaded"),
        (
            lambda source: (source / "model.safetensors").write_bytes(b"x" * 99),
            ValueError,
            "not a complete safetensors",
        ),
        (lambda source: _change(source, lambda key, tensor: tensor * float("nan")), ValueError, "expected finite"),
        (lambda source: _change(source, lambda key, tensor: tensor.to(torch.int8)), ValueError, "is I8, expected"),
        (lambda source: _rename(source), ValueError, "keeps them under other names"),
        (lambda source: _configure(source, architectures=["Mystery"]), ValueError, "no class 'Mystery'"),
        (lambda source: _configure(source, quantization_config={}), ValueError, "quantised already"),
    ],
)
def test_what_cannot_be_read_is_refused(damage, error, message, tmp_path):
    model = MODELS[0]
    model.fresh().save_pretrained(tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(error, match=message):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", config_of(model))
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_full_folder_and_another_method_are_refused(tmp_path):
    model = MODELS[0]
    model.fresh().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="not empty"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "source", config_of(model))
    with pytest.raises(ValueError, match="Pass a DotaConfig"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", LortaConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no folder of that name"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "out", config_of(model))


def _change(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors = {key: change(key, tensor) if "q_proj" in key else tensor for key, tensor in tensors.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def _rename(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file({key.replace("q_proj", "wq"): tensor for key, tensor in tensors.items()}, source / "model.safetensors")


def _configure(source: Path, **fields) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_state_file_that_was_not_finished_is_written_again(tmp_path):
    model = MODELS[0]
    model.fresh().save_pretrained(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quantize_state.json.unfinished").touch()
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", config_of(model))
    assert not list((tmp_path / "out").glob("*.unfinished"))
