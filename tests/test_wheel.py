"""The wheel as pip installs it, away from the source: the command, the recipes in it, a recipe run by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cases import tiny_llama

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "src/tensorpeft/recipes"
DATA = Path(os.environ.get("TENSORPEFT_DATA", ROOT.parent / "shared")).absolute()
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel is installed into; the libraries it needs are the environment's."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    # Of a copy: a build leaves its own folders beside the source.
    source = folder / "source"
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and name.startswith(("src/", "pyproject", "README", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    return site


@pytest.fixture
def run(installed, tmp_path):
    """Runs the installed script in an empty folder, offline; gives what it printed."""

    def start(*words: str) -> str:
        environment = os.environ | {
            "PYTHONPATH": str(installed),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TENSORPEFT_DATA": str(DATA),
        }
        command = [sys.executable, str(installed / "bin/tensorpeft"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    return start


def test_it_is_the_installed_one_that_runs(installed, tmp_path):
    script = (
        "from importlib.util import find_spec as find; print(find('tensorpeft').origin, find('tensorpeft_cli').origin)"
    )
    command, environment = [sys.executable, "-c", script], os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert all(Path(origin).is_relative_to(installed) for origin in done.stdout.split())


def test_all_that_is_no_code_is_in_it(installed):
    sources = [path for path in (ROOT / "src/tensorpeft").rglob("*.*") if path.suffix not in (".py", ".pyc")]
    assert {".jinja", ".yaml"} <= {path.suffix for path in sources}
    for path in sources:
        assert (installed / path.relative_to(ROOT / "src")).read_bytes() == path.read_bytes(), path


def test_it_lists_the_recipes_and_prints_one(run):
    listed = run("recipes").split()
    names = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")]
    assert len(names) > 30
    assert set(names) <= set(listed)
    assert run("recipes", "demo") == (RECIPES / "demo.yaml").read_text(encoding="utf-8")


def test_it_plans(run, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    printed = run("plan", "model", "--methods", "lora,dota", "--rank", "4", "--target-modules", "q_proj", "up_proj")
    assert "DoTA" in printed


@pytest.mark.skipif(not (DATA / "models").is_dir(), reason=f"no data in {DATA}; set TENSORPEFT_DATA")
def test_it_trains_a_recipe_by_its_name(run, tmp_path):
    printed = run("train", "small/stories_sft", "--smoke", "output=run", "trainer.max_steps=2", "trainer.eval_steps=1")
    assert "Report, curves, adapters: run" in printed
    assert (tmp_path / "run/seed-0/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "run/report.md").is_file()
