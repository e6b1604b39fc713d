"""What the command does with its words, around what its commands do: exit codes, errors, the words themselves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

pytest.importorskip("rich")
import tensorpeft_cli
from cases import tiny_llama
from tensorpeft_cli import main

# The least that each command with a model takes.
LINES = {
    "demo": [],
    "train": ["demo"],
    "compare": ["demo"],
    "chat": ["adapter"],
    "evaluate": ["model", "--lm-eval", "piqa"],
    "plan": ["model"],
    "inspect": ["model"],
    "quantize": ["model", "out"],
    "export": ["dense", ".", "out"],
}


@pytest.mark.parametrize("form", ["lora", "delta", "dense"])
@pytest.mark.parametrize(("method", "is_same"), [("LORTA", True), ("LORTA", False), ("LORA", True)])
def test_an_export_is_not_written_over_an_adapter(form, method, is_same, tmp_path, capsys):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    for folder in (adapter, out):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(f'{{"peft_type": "{method}"}}')
    out = adapter if is_same else out
    assert main(["export", form, str(adapter), str(out)]) == 2
    assert f"holds an adapter ({method}), which would be written over" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["adapter_config.json"]


class StoppedError(Exception):
    """Where a command would begin to import."""


@pytest.fixture
def stopped(monkeypatch):
    """Every command stops where it would import the package."""

    def stop():
        raise StoppedError

    for name in LINES:
        monkeypatch.setattr(getattr(tensorpeft_cli, name), "import_package", stop)


@pytest.fixture
def planned(monkeypatch):
    """Replaces what `tensorpeft plan` does by a function of the arguments."""

    def replace(function):
        monkeypatch.setattr(tensorpeft_cli.plan, "_run", lambda arguments, command: function(arguments))

    return replace


def test_every_command_takes_a_model_but_for_two():
    assert LINES.keys() == tensorpeft_cli.COMMANDS.keys() - {"recipes", "enable-autoload"}


@pytest.mark.parametrize("name", LINES)
def test_every_command_with_a_model_takes_the_cache_of_such_models(name, stopped, monkeypatch):
    monkeypatch.delenv("TENSORPEFT_CACHE", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(StoppedError):
        main([name, *LINES[name]])
    assert "TENSORPEFT_CACHE" not in os.environ
    with pytest.raises(StoppedError):
        main([name, *LINES[name], "--cache", "folder"])
    assert os.environ["TENSORPEFT_CACHE"] == str(Path("folder").absolute())


def test_words_of_a_recipe_stand_anywhere(monkeypatch):
    seen = []
    monkeypatch.setattr(tensorpeft_cli.train, "_run", lambda arguments, command: seen.append((arguments, command)))
    assert main(["train", "demo", "seeds=[0,1]", "--smoke", "trainer.learning_rate=1e-3"]) == 0
    ((arguments, command),) = seen
    assert list(arguments.overrides) == ["seeds=[0,1]", "trainer.learning_rate=1e-3"]
    assert command == "tensorpeft train demo 'seeds=[0,1]' --smoke trainer.learning_rate=1e-3"


def test_the_exit_code_is_the_commands(planned):
    planned(lambda arguments: None)
    assert main(["plan", "model"]) == 0
    planned(lambda arguments: 1)
    assert main(["plan", "model"]) == 1


@pytest.mark.parametrize("error", [ValueError("two\n  lines"), OSError("two lines"), ImportError("two lines")])
def test_a_user_error_is_one_line_and_exit_code_2(planned, capsys, error):
    def fail(arguments):
        raise error

    planned(fail)
    assert main(["plan", "model"]) == 2
    assert capsys.readouterr().err == "tensorpeft: two lines\n"


def test_what_a_user_names_moves_no_terminal(capsys):
    assert main(["train", "\x1b[31mnowhere\x1b]0;title\x07[/b].yaml"]) == 2
    assert capsys.readouterr().err.startswith("tensorpeft: no recipe nowhere[/b].yaml")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("8 TB"), "the memory does not suffice: 8 TB"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory"), "the memory does not suffice"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "PytorchStreamWriter failed"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8384 vs 8278"),
            "the disk is not full",
        ),
        (SafetensorError("I/O error: No space left on device"), "No space left on device"),
        (re.error("missing )", "a(", 2), "'a(': no regular expression: missing ) at position 2"),
    ],
)
def test_the_ends_of_memory_and_disk_are_no_bugs(planned, capsys, error, message):
    def fail(arguments):
        raise error

    planned(fail)
    assert main(["plan", "model"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["compare", "demo", "--seeds"], ["compare", "demo", "--workers"], ["demo", "--seeds"]]
)
def test_numbers_that_no_machine_could_do_are_refused_at_once(words, capsys):
    assert main([*words, "9" * 30]) == 2
    assert "expected a whole number of at most 1000" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"])
def test_sizes_that_no_model_has_are_refused_at_once(tmp_path, capsys, field):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], field: 10**12}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["plan", str(tmp_path)]) == 2
    assert f"{field}=1e+12 in its configuration: expected at most" in capsys.readouterr().err


@pytest.mark.parametrize("error", [TypeError("x"), RuntimeError("x"), ModuleNotFoundError("x", name="tensorpeft.x")])
def test_a_bug_is_seen(planned, error):
    def fail(arguments):
        raise error

    planned(fail)
    with pytest.raises(type(error)):
        main(["plan", "model"])


def test_a_missing_library_names_the_extra(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorpeft.studies.plan_report", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["plan", "model"]) == 2
    assert 'pip install "tensorpeft[train]"' in capsys.readouterr().err


def test_a_model_that_is_nowhere(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "modle"]) == 2
    assert capsys.readouterr().err.startswith("tensorpeft: modle: no folder of that name")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("Not there."), ConnectionError("Not there")])
def test_what_the_hub_does_not_give_is_told_with_what_to_do(planned, capsys, error):
    def fail(arguments, text="the data cannot be read"):
        raise ValueError(text) from error

    planned(fail)
    assert main(["plan", "model"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tensorpeft: the data cannot be read. Pass a folder or file of this machine")
    planned(lambda arguments: fail(arguments, "no such data. Pass a file."))
    assert main(["plan", "model"]) == 2
    assert capsys.readouterr().err == "tensorpeft: no such data. Pass a file.\n"


def test_demo_compares_on_the_packaged_recipe(monkeypatch):
    pytest.importorskip("omegaconf")
    run = pytest.importorskip("tensorpeft.studies.compare.run")
    seen, results = [], []

    def run_compare(comparison, timing_rounds, command):
        seen.append(comparison)
        return results

    monkeypatch.setattr(run, "run_compare", run_compare)
    results.append(SimpleNamespace(has_failed=True))
    assert main(["demo"]) == 1
    results.clear()
    assert main(["demo", "--quick", "--methods", "lora,lotr", "--seeds", "1", "--output", "there"]) == 0
    assert main(["demo", "--quick"]) == 0
    whole, quick, quick_here = seen
    assert whole.output == Path("runs/demo")
    assert quick_here.output == Path("runs/demo-smoke")  # not in the way of the whole one
    assert quick.output == Path("there")
    assert [entry.key for entry in quick.entries] == ["lora", "lotr"]
    assert quick.seeds == 1
    assert quick.recipe != whole.recipe


@pytest.mark.parametrize(
    ("line", "mode", "option"),
    [
        ("cola --num-beams 4 --max-length 9", "labels", "num_beams=4"),
        ("cola --beta 1", "labels", "beta=1.0"),
        ("preferences --max-new-tokens 5", "preferences", "max_new_tokens=5"),
        ("gsm8k --beta 1", "generate", "beta=1.0"),
        ("gsm8k --mode loss --num-beams 4", "loss", "num_beams=4"),
        ("folding --max-length 9", "structures", "max_length=9"),
    ],
)
def test_an_option_that_the_task_does_not_look_at_is_refused(line, mode, option, capsys):
    task = line.split()[0]
    assert main(["evaluate", "model", "--data", "rows", "--task", *line.split()]) == 2
    expected = f"tensorpeft: {option}: it changes nothing with {task} (mode {mode}). Leave it out."
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_a_recipe_is_printed_as_it_stands(capsys):
    assert main(["recipes", "small/stories_sft"]) == 0
    packaged = Path(tensorpeft_cli.__file__).parents[1] / "tensorpeft/recipes/small/stories_sft.yaml"
    assert capsys.readouterr().out == packaged.read_text(encoding="utf-8")


def test_a_reader_that_has_read_enough_is_no_error():
    command = [sys.executable, "-c", "import sys, tensorpeft_cli; sys.exit(tensorpeft_cli.run())", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="plan forks on Linux")
def test_ctrl_c_ends_the_processes_of_a_plan_without_a_word(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    script = "import sys, tensorpeft_cli; sys.exit(tensorpeft_cli.run())"
    command = [sys.executable, "-c", script, "plan", str(tmp_path), "--length", "2048"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and len(children.read_text().split()) < 2:
            time.sleep(0.02)
        time.sleep(1)  # for the processes to begin
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, "it ended before it could be interrupted: make its work longer"
    assert error == "tensorpeft: interrupted.\n"


@pytest.mark.slow
def test_python_m_runs_the_command():
    command = [sys.executable, "-m", "tensorpeft", "plan", "model", "--rank", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "tensorpeft: --rank 0" in done.stderr
