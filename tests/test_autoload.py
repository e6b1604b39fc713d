"""`tensorpeft enable-autoload`: programs that know PEFT alone load our adapters, where a person asked for it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from cases import logits
from commanded import fill
from tensorpeft_cli import main
from tensorpeft_cli.autoload import FILE

# As a program starts in an environment: site runs the .pth files of its folder before all else.
PROGRAM = """
import site, sys
site.addsitedir(sys.argv[1])
assert not {"peft", "torch", "tensorpeft"} & set(sys.modules), "a start of Python must stay what it was"
from importlib.util import find_spec
assert find_spec("peft") is not None and "tensorpeft" not in sys.modules  # asked for, not imported
from peft import AutoPeftModelForCausalLM
import torch
from safetensors.torch import save_file
model = AutoPeftModelForCausalLM.from_pretrained("adapter").eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(3, 24).view(3, 7)).logits}, "logits.safetensors")
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch) -> Path:
    """The folder of packages of an environment."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    return folder


def start(program: str, folder: Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore::FutureWarning", "-c", program, str(folder)]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_program_that_knows_peft_alone_loads_our_adapter(environment: Path, tmp_path: Path, monkeypatch, capsys):
    torch.manual_seed(0)
    fill(tmp_path)
    assert main(["enable-autoload"]) == 0
    assert str(environment / FILE) in capsys.readouterr().out
    done = start(PROGRAM, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    expected = logits(AutoPeftModelForCausalLM.from_pretrained("adapter").eval(), torch.arange(3, 24).view(3, 7))
    assert torch.equal(load_file("logits.safetensors")["logits"], expected)
    assert main(["enable-autoload", "--remove"]) == 0
    assert not list(environment.iterdir())
    assert "KeyError" in start(PROGRAM, environment, tmp_path).stderr


@pytest.mark.slow
def test_peft_works_where_we_do_not(environment: Path, tmp_path: Path):
    main(["enable-autoload"])
    broken = tmp_path / "broken/tensorpeft"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import no_such_library")
    program = f"import sys; sys.path.insert(0, {str(broken.parent)!r})\n" + (
        "import site; site.addsitedir(sys.argv[1]); import peft; print(peft.LoraConfig)"
    )
    done = start(program, environment, tmp_path)
    assert "LoraConfig" in done.stdout
    assert "tensorpeft is not loaded with peft: ModuleNotFoundError: No module named 'no_such_library'" in done.stderr


def test_a_file_that_is_left_behind_does_nothing(environment: Path, tmp_path: Path):
    main(["enable-autoload"])
    without_us = [sys.executable, "-S", "-c", "import site, sys; site.addsitedir(sys.argv[1])", str(environment)]
    done = subprocess.run(without_us, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
