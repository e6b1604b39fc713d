"""The patch that we would propose to PEFT (docs/upstream), on a copy of the PEFT that is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

import tensorpeft
from cases import logits
from commanded import fill

ROOT = Path(__file__).parents[1]
PATCH = ROOT / "docs" / "upstream" / "peft-0.21.2-plugins.patch"
ENTRY_POINTS = '[project.entry-points."peft.tuners"]\ntensorpeft = "tensorpeft"\n'
PROGRAM = """
import json, sys, torch
from pathlib import Path
from peft import AutoPeftModelForCausalLM, PeftConfig
from peft.utils import plugins
from safetensors.torch import save_file

assert Path(plugins.__file__).parents[2] == Path("patched").absolute()
plugins.entry_points = lambda group: []  # as if tensorpeft were not installed
file = Path("adapter/adapter_config.json")
saved = file.read_text()
for config, remedy in ((json.loads(saved), "install the package that the adapter's model card names"),
                       (json.loads(saved) | {"peft_plugin": "tensorpeft"}, "saved with the package 'tensorpeft'")):
    file.write_text(json.dumps(config))
    for load in (PeftConfig, AutoPeftModelForCausalLM):
        try:
            load.from_pretrained("adapter")
        except KeyError as error:
            assert "The PEFT type 'LORTA' is neither" in str(error) and remedy in str(error), error
        else:
            raise AssertionError("loaded without the plug-in")
del plugins.entry_points
from importlib.metadata import entry_points
plugins.entry_points = entry_points
assert "tensorpeft" not in sys.modules
model = AutoPeftModelForCausalLM.from_pretrained("adapter").eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(3, 24).view(3, 7)).logits}, "logits.safetensors")
model.save_pretrained("again")
assert json.loads(Path("again/adapter_config.json").read_text())["peft_plugin"] == "tensorpeft"
"""


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """A folder of packages with the patched PEFT, and with our entry point as an installation writes it."""
    if peft.__version__ != "0.21.2":
        pytest.skip(f"the patch is for PEFT 0.21.2, not {peft.__version__}")
    folder = tmp_path / "patched"
    shutil.copytree(Path(peft.__file__).parent, folder / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    tool = next((words for words in (["git", "apply", "-p2"], ["patch", "-p2", "-i"]) if shutil.which(words[0])), None)
    if tool is None:
        pytest.skip("neither git nor patch is installed")
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}  # of any repository
    done = subprocess.run([*tool, str(PATCH)], cwd=folder, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    information = folder / "tensorpeft-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorpeft\nVersion: 0.1.0\n")
    (information / "entry_points.txt").write_text("[peft.tuners]\ntensorpeft = tensorpeft\n")
    return folder


def start(words: list[str], patched: Path) -> subprocess.CompletedProcess:
    paths = [str(patched), str(Path(tensorpeft.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *words], cwd=patched.parent, env=environment, capture_output=True, text=True)


def test_the_patch_fits_the_installed_peft_and_we_have_the_entry_point(patched: Path):
    assert (patched / "peft" / "utils" / "plugins.py").is_file()
    assert ENTRY_POINTS in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.thorough
def test_patched_peft_loads_our_adapter_without_the_import_or_says_what_is_missing(
    patched: Path, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    expected = logits(AutoPeftModelForCausalLM.from_pretrained("adapter").eval(), torch.arange(3, 24).view(3, 7))
    done = start(["-W", "ignore", "-c", PROGRAM], patched)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file("logits.safetensors")["logits"], expected)


@pytest.mark.thorough
def test_the_patch_s_own_tests(patched: Path):
    done = start(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(patched / "test_plugins.py")], patched)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
