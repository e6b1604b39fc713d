"""The experiments for PEFT's MetaMathQA comparison: their sizes, how PEFT's script is started, the small version."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import tensorpeft  # noqa: F401  # registers our methods

pytest.importorskip("matplotlib")
FOLDER = Path(__file__).parents[1] / "benchmarks" / "peft_method_comparison"
DATA = Path(os.environ.get("TENSORPEFT_DATA", FOLDER.parents[2] / "shared"))
sys.path.insert(0, str(FOLDER))
import plot  # noqa: E402

SIZES = {
    name: int(count.replace(",", ""))
    for name, count in re.findall(r"^\| (\S+/\S+) \| ([\d,]+) \|", (FOLDER / "README.md").read_text("utf-8"), re.M)
}
FRONT = [(6_144, 0.246), (28_672, 0.321), (121_856, 0.356), (229_376, 0.397), (280_000, 0.403), (630_784, 0.455)]


def call(*arguments, **more):
    command = [sys.executable, str(FOLDER / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **more)


@pytest.fixture(scope="module")
def llama():
    """Llama-3.2-3B without weights; its vocabulary, which nothing adapts, is cut."""
    config = LlamaConfig(
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=64,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_the_readme_lists_every_experiment():
    experiments = {
        file.parent.relative_to(FOLDER / "experiments").as_posix() for file in FOLDER.rglob("adapter_*.json")
    }
    assert experiments == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_an_experiment_has_the_size_that_the_readme_says(name, llama):
    config = PeftConfig.from_pretrained(str(FOLDER / "experiments" / name))
    model = get_peft_model(llama, config)
    try:
        assert model.get_nb_trainable_parameters()[0] == SIZES[name]
    finally:
        model.unload()


def test_the_published_front_below_a_million_is_that_of_pefts_readers():
    front = plot.front_of(point for point in plot.read_published().values() if 4_000 < point.parameters < 1_000_000)
    assert [(point.parameters, round(point.accuracy, 3)) for point in front] == FRONT


def result(name, parameters, accuracy, model="meta-llama/Llama-3.2-3B", status="success"):
    metrics = [{"step": 250, "valid accuracy": 0.1}, {"step": 5000, "test accuracy": accuracy}]
    return {
        "run_info": {"experiment_name": name, "train_config": {"model_id": model}},
        "train_info": {"num_trainable_params": parameters, "status": status, "metrics": metrics},
    }


def test_finished_results_of_ours_are_set_against_the_front(tmp_path):
    for number, found in enumerate(
        [
            result("lorta/llama-3.2-3B-rank8", 26_048, 0.35),
            result("lora/llama-3.2-3B-rank32", 9_175_040, 0.478),
            result("lorta/llama-3.2-3B-rank2", 6_512, 0.9, model="small"),
            result("dota/llama-3.2-3B-rank5", 281_120, 0.9, status="canceled"),
        ]
    ):
        (tmp_path / f"{number}.json").write_text(json.dumps(found), encoding="utf-8")
    ours = plot.read_results(tmp_path)
    assert ours == {"lorta/llama-3.2-3B-rank8": (26_048, 0.35)}
    table = plot.make_table(ours, plot.front_of(plot.read_published().values()))
    assert "| 26,048 | 0.350 | 0.246 (6,144) | +10.4 |" in table
    plot.draw(plot.read_published(), ours, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000


STAND_IN = """
import sys
from peft import PeftConfig
import utils
print(sys.argv[1:], PeftConfig.from_pretrained(sys.argv[-1]).peft_type, utils.NAME)
"""


def test_pefts_own_script_is_started_where_it_looks_and_knows_our_methods(tmp_path):
    comparison = tmp_path / "method_comparison" / "MetaMathQA"
    comparison.mkdir(parents=True)
    assert "git clone" in call("--peft", tmp_path, "lorta/llama-3.2-3B-rank8").stderr
    (comparison / "run.py").write_text(STAND_IN, encoding="utf-8")
    (comparison / "utils.py").write_text("NAME = 'of the checkout'", encoding="utf-8")
    found = call("--peft", tmp_path, "lorta/llama-3.2-3B-rank8")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "['-v', 'experiments/lorta/llama-3.2-3B-rank8'] PeftType.LORTA of the checkout"


def test_only_experiments_without_a_result_are_run_each_in_a_process_of_its_own(tmp_path, monkeypatch):
    comparison = tmp_path / "method_comparison" / "MetaMathQA"
    for folder, name in (("results", "rank2.json"), ("temporary_results", "rank8--2026-08-21T10-00-00.json")):
        (comparison / folder).mkdir(parents=True)
        (comparison / folder / f"lorta--llama-3.2-3B-{name}").write_text("{}", encoding="utf-8")
    (comparison / "run.py").touch()
    script, commands = runpy.run_path(str(FOLDER / "run.py")), []

    def record(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", record)
    failed = script["run_all"](tmp_path, [f"lorta/llama-3.2-3B-rank{rank}" for rank in (2, 8, 37, 70)])
    assert failed == len(commands) == 2
    assert [command[-1] for command in commands] == ["lorta/llama-3.2-3B-rank37", "lorta/llama-3.2-3B-rank70"]
    assert commands[0][1:-1] == [str(FOLDER / "run.py"), "--peft", str(tmp_path)]


@pytest.mark.recipes
@pytest.mark.skipif(not (DATA / "data").is_dir(), reason=f"no data in {DATA}; set TENSORPEFT_DATA")
def test_every_experiment_runs_its_small_version(tmp_path):
    model, data = DATA / "models" / "stories260K", DATA / "data" / "gsm8k" / "train.jsonl"
    found = call("--smoke", model, "--data", data, "--output", tmp_path)
    assert found.returncode == 0, found.stderr
    results = [json.loads(file.read_text(encoding="utf-8")) for file in tmp_path.glob("*.json")]
    assert {tree["run_info"]["experiment_name"] for tree in results} == set(SIZES)
    for tree in results:
        losses = [entry["train loss"] for entry in tree["train_info"]["metrics"]]
        assert all(0 < loss < 20 for loss in losses)
        assert len(set(losses[:-1])) > 1
