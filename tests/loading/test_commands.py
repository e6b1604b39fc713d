"""A GGUF file is a model wherever a command takes one."""

import json
from io import StringIO

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tiny_gguf import tensors, write

from cases import perturb
from tensorpeft.evaluation import EvaluationOptions
from tensorpeft.evaluation.run import run_evaluate
from tensorpeft.export import to_dense, to_lora
from tensorpeft.loading.names import resolve
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.models import adapt, load_base, load_tokenizer
from tensorpeft.training.recipe import DataRecipe, Recipe
from tensorpeft_cli import main

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache_folder):
    """A folder with one GGUF file, which stands for its model, and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny").mkdir()
    write(folder / "tiny/tiny.gguf", tensors(tied=True))
    recipe = Recipe(
        str(folder / "tiny"),
        "instructions",
        DataRecipe("train.json", 1),
        adapter={"method": "lorta", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    )
    task = find_task(recipe.task)
    assert isinstance(load_tokenizer(recipe, task).chat_template, str)
    adapted = adapt(load_base(recipe, task, None, seed=0), recipe, task)
    perturb(adapted)
    adapted.save_pretrained(folder / "adapter")
    return folder


def test_an_adapter_names_the_folder_in_the_cache(folder):
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == resolve(folder / "tiny")
    assert AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").peft_type == "LORTA"


def test_evaluate(folder, tmp_path):
    rows = [{"instruction": "hello", "input": "", "output": " world"}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = EvaluationOptions("loss", batch_size=2)
    losses = [
        run_evaluate(
            str(folder / model), adapter, "instructions", tmp_path / "rows.json", options, tmp_path, terminal=StringIO()
        ).metrics
        for model, adapter in (("adapter", None), ("tiny/tiny.gguf", folder / "adapter"), ("tiny", None))
    ]
    assert losses[0] == losses[1] != losses[2]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["model"] == str(folder / "tiny")  # as it was called


def test_plan_inspect_and_quantize(folder, tmp_path):
    name = str(folder / "tiny")
    assert main(["plan", name, "--methods", "lora,dota", "--rank", "2", "--length", "8"]) == 0
    network = ["--r", "4", "--num-cores", "3", "--target-modules", "q_proj"]
    assert main(["inspect", name, *network, "--output", str(tmp_path / "bonds")]) == 0
    assert len(json.loads((tmp_path / "bonds/bonds.json").read_text())["bonds"]) == 2
    assert main(["quantize", name, str(tmp_path / "base"), *network]) == 0
    assert (tmp_path / "base/tokenizer.json").is_file()


def test_export(folder, tmp_path):
    dense = to_dense(folder / "adapter", tmp_path / "dense", torch.float32, base=str(folder / "tiny/tiny.gguf"))
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(dense.eval()(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "dense/tokenizer.json").is_file()
    assert to_lora(folder / "adapter", tmp_path / "lora")
