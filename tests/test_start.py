"""The command in a process of its own: help and usage errors import nothing but the standard library."""

import json
import subprocess
import sys
from collections.abc import Iterable

import pytest

from tensorpeft_cli import COMMANDS

# A process starts the command once per line of its input. What the interpreter has imported before, site-packages' own
# hooks included, is nobody's business.
SCRIPT = """
import contextlib, io, json, sys
before = set(sys.modules)
from tensorpeft_cli import run
for line in sys.stdin.read().splitlines():
    sys.argv = ["tensorpeft", *line.split()]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = run()
        except SystemExit as end:
            code = end.code
    names = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
    print(json.dumps([line, code, sorted(names), out.getvalue(), error.getvalue()]))
"""
HELP = ["", *COMMANDS, "inspect bonds", "inspect quantization", "export lora", "export dense", "export gguf"]
ERRORS = {
    "": "required: COMMAND",
    "no-such-command": "no-such-command",
    "demo --seeds 0": "--seeds 0: expected a whole number of at least 1",
    "demo --no-such-option": "--no-such-option",
    "train no-such-recipe": "no recipe no-such-recipe",
    "train dota/comonsense_llama2_7b": "Did you mean dota/commonsense_llama2_7b",
    "train demo seeds": "seeds: expected KEY=VALUE",
    "compare demo --timing-rounds -1": "--timing-rounds -1: expected a whole number of at least 0",
    "compare demo --budget 5x": "--budget 5x: expected a number of parameters",
    "compare demo --methods lora,lora": "lora,lora: expected different names",
    "compare demo --target-loss nan": "--target-loss nan: expected a number, such as 0.1",
    "evaluate model": "pass one of --task NAME",
    "evaluate model --task cola": "Pass a published file as --data FILE",
    "evaluate model --task cola --data hub:glue": "expected hub:NAME:SPLIT",
    "evaluate model --task cola --data file --few-shot 2": "--few-shot changes nothing with --task",
    "evaluate model --lm-eval piqa --num-beams 2": "--num-beams changes nothing with --lm-eval",
    "evaluate model --task cola --mt-bench .": "--lm-eval NAMES and --mt-bench",
    "evaluate model --lm-eval piqa --chat": "--chat changes nothing with --lm-eval",
    "evaluate model --mt-bench . --num-beams 2": "--num-beams changes nothing with --mt-bench",
    "evaluate model --task cola --data file --rows 0": "--rows 0: expected",
    "plan /no/such/folder": "/no/such/folder: no such file or folder",
    "plan no-such-model.gguf": "no-such-model.gguf: no such file or folder",
    "plan model --gpu huge": "--gpu huge: expected a GPU's memory, such as 24GB",
    "plan model --methods lora,sora": "no method 'sora'. Choose from full, lora,",
    "plan model --rank 8 --budget 1M": "not allowed with",
    "plan model --budget 0": "--budget 0: expected",
    "inspect model --text pyproject.toml": "Add --weighted",
    "inspect model --budget ten": "--budget ten: expected",
    "quantize model out --num-cores 1": "--num-cores 1: expected a whole number of at least 2",
    "export lora no-such-adapter out": "no-such-adapter: no such file or folder",
    "export dense tests out --dtype int8": "int8",
    "export gguf tests out --outtype q4_0": "q4_0",
    "export gguf tests out --merged --rank 2": "--rank, --energy: a merged model has the whole update",
    "recipes no-such-recipe": "no recipe no-such-recipe",
}


def start(lines: Iterable[str]) -> dict[str, tuple[int, list[str], str, str]]:
    """By line: exit code, what is imported by now beside the standard library, standard output, standard error."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {line: tuple(rest) for line, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def started() -> dict[str, tuple[int, list[str], str, str]]:
    return start([*(f"{words} --help" for words in HELP), *ERRORS])


@pytest.mark.parametrize("words", HELP)
def test_help_imports_nothing(started, words):
    code, names, printed, error = started[f"{words} --help"]
    assert code == 0
    assert names == ["tensorpeft_cli"]
    assert printed.startswith(f"usage: tensorpeft {words}".rstrip())
    assert error == ""


@pytest.mark.parametrize(("line", "message"), ERRORS.items(), ids=ERRORS)
def test_a_usage_error_is_one_line_and_imports_nothing(started, line, message):
    code, names, printed, error = started[line]
    assert code == 2
    assert names == ["tensorpeft_cli"]
    assert printed == ""
    assert error.startswith("tensorpeft: ")
    assert error.count("\n") == 1
    assert message in error


def test_the_recipes_are_listed_without_the_package():
    code, names, printed, error = start(["recipes"])["recipes"]
    assert code == 0
    assert not {"tensorpeft", "numpy", "omegaconf", "peft", "rich", "torch", "transformers"} & set(names)
    assert error == ""
    assert "dota/commonsense_llama2_7b" in printed
    assert max(map(len, printed.splitlines())) <= 100


# What libraries say at their import and when they are used, and a warning of our own.
NOISY = """
import logging, sys, warnings
from tensorpeft_cli.package import import_package
import_package()
import bitsandbytes
warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning)
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load")
warnings.warn("ours", UserWarning)
"""


def test_libraries_say_nothing_and_we_do():
    pytest.importorskip("bitsandbytes")
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[0].endswith("UserWarning: ours")
    assert "Failed to load" not in done.stderr
    assert "is_gradient_checkpointing" not in done.stderr


INTERRUPTED = """
import os, signal, sys, time
import tensorpeft_cli.plan
def import_package():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
tensorpeft_cli.plan.import_package = import_package
sys.exit(tensorpeft_cli.run())
"""


def test_ctrl_c_is_one_line_and_exit_code_130():
    command = [sys.executable, "-c", INTERRUPTED, "plan", "model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130
    assert done.stderr == "tensorpeft: interrupted.\n"
