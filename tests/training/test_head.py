"""A head that starts from noise and of which a LoRA is trained."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

pytest.importorskip("omegaconf")
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.run import run_evaluate
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.head import fold_head, restrict_head
from tensorpeft.training.models import adapt, load_base, load_tokenizer
from tensorpeft.training.recipe import HeadRecipe, load_recipe
from tensorpeft.training.run import run_training
from tensorpeft.training.seed import score_seed
from tensorpeft.training.splits import load_splits

LORA_HEAD = "head={target_modules: [classifier], r: 1}"


@pytest.fixture
def roberta():
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=20, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    return RobertaForSequenceClassification(config).eval()


def test_a_lora_of_a_head_starts_as_the_head_and_trains_no_more_than_it_says(roberta):
    ids = torch.arange(5)[None]
    before = roberta(ids).logits
    restrict_head(roberta, HeadRecipe(["dense"], r=2, alpha=6))
    assert torch.equal(roberta(ids).logits, before)
    trained = {name: p for name, p in roberta.classifier.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in trained.items()} == {"dense.down": (2, 12), "dense.up": (12, 2)}
    start = roberta.classifier.dense.weight.clone()
    nn.init.normal_(trained["dense.up"])
    after = roberta(ids).logits
    fold_head(roberta)
    assert type(roberta.classifier.dense) is type(roberta.classifier.out_proj) is nn.Linear
    torch.testing.assert_close(roberta(ids).logits, after)
    expected = start + 3 * trained["dense.up"] @ trained["dense.down"]
    torch.testing.assert_close(roberta.classifier.dense.weight, expected)


def test_a_layer_that_the_head_has_not_is_refused_by_its_names(roberta):
    with pytest.raises(ValueError, match=r"no linear layer of the head .* has classifier\.dense, classifier\.out_proj"):
        restrict_head(roberta, HeadRecipe(["query"]))


def test_a_run_trains_a_lora_of_the_head_and_saves_a_whole_one(place, tmp_path):
    recipe = load_recipe(place / "labels.yaml", [LORA_HEAD, f"output={tmp_path}", "trainer.learning_rate=1e-1"])
    (result,) = run_training(recipe)
    task, saved = find_task(recipe.task), tmp_path / "seed-0/adapter"
    base = load_base(recipe, task, load_tokenizer(recipe, task), seed=0)
    weight = load_file(saved / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    change = (weight - base.classifier.weight).detach()
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 1
    adapter = adapt(load_base(replace(recipe, head=None), task, load_tokenizer(recipe, task), seed=0), recipe, task)
    of_head = base.classifier.in_features + base.classifier.out_features
    assert result.trained_parameters == of_head + sum(
        p.numel() for name, p in adapter.named_parameters() if p.requires_grad and "classifier" not in name
    )
    loaded = PeftModel.from_pretrained(load_base(recipe, task, load_tokenizer(recipe, task), seed=1), saved)
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, weight)
    # What the command says of the saved adapter is what the run said.
    run_evaluate(recipe.model, saved, "sst2", recipe.data.test, EvaluationOptions(), tmp_path / "again", rows=6)
    again = json.loads((tmp_path / "again/results.json").read_text(encoding="utf-8"))
    assert again["metrics"] == pytest.approx(result.tests["sst2"])


def test_modules_that_are_trained_beside_a_head_stay_what_the_recipe_says(place):
    recipe = load_recipe(place / "labels.yaml", ["adapter.modules_to_save=[LayerNorm]"])
    task = find_task(recipe.task)
    model = adapt(load_base(recipe, task, load_tokenizer(recipe, task), seed=0), recipe, task)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("LayerNorm" in name for name in trained)
    assert any("classifier" in name for name in trained)
    assert recipe.adapter is not None
    assert recipe.adapter["modules_to_save"] == ["LayerNorm"]


@pytest.mark.recipes
def test_a_run_with_a_lora_of_the_head_goes_on_and_is_scored_later(place, tmp_path):
    recipe = load_recipe(place / "labels.yaml", [LORA_HEAD, f"output={tmp_path}"])
    file = tmp_path / "seed-0/results.json"
    (whole,) = run_training(recipe)
    file.unlink()
    (resumed,) = run_training(recipe, resume=True)  # from its last checkpoint
    assert (resumed.validation["loss"], resumed.tests) == (pytest.approx(whole.validation["loss"]), whole.tests)
    replace(resumed, tests={}).write(file)
    task = find_task(recipe.task)
    arguments = make_arguments(recipe.trainer, task, file.parent, seed=0)
    scored = score_seed(recipe, load_splits(recipe), arguments, EvaluationOptions(), Console(quiet=True))
    assert scored == resumed
