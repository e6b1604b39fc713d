"""A head that starts from noise and of which a LoRA is trained, or a tensor train."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetModel,
    set_seed,
)

pytest.importorskip("omegaconf")
from evaluation.evaluated import word_tokenizer
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.run import run_evaluate
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.head import TrainHeadLayer, fold_head, restrict_head
from tensorpeft.training.models import adapt, load_base, load_tokenizer
from tensorpeft.training.recipe import HeadRecipe, load_recipe
from tensorpeft.training.run import run_training
from tensorpeft.training.seed import score_seed
from tensorpeft.training.splits import load_splits
from tensorpeft.training.trainers import make_trainer

LORA_HEAD = "head={target_modules: [classifier], r: 1}"
TRAIN_HEAD = "head={target_modules: [classifier], tt_rank: 2}"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_the_head_that_is_a_tensor_train_has_its_entries(roberta, dtype):
    """Against the sum over the bonds, written out; modes of 12 near 8 are 12 itself, so the train has two cores."""
    roberta.to(dtype)
    dense, ids = roberta.classifier.dense, torch.arange(5)[None]
    nn.init.normal_(dense.bias)
    bias, spread = dense.bias.detach().clone(), dense.weight.std().item()
    restrict_head(roberta, HeadRecipe(["dense"], tt_rank=5))
    trained = {name: p for name, p in roberta.classifier.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in trained.items()} == {
        "dense.cores.0": (1, 12, 5),
        "dense.cores.1": (5, 12, 1),
        "dense.bias": (12,),
    }
    assert {p.dtype for p in trained.values()} == {torch.float32}
    first, second = (trained[f"dense.cores.{k}"].detach().double() for k in (0, 1))
    weight = torch.tensor([[(first[0, o] * second[:, i, 0]).sum() for i in range(12)] for o in range(12)])
    assert weight.std().item() == pytest.approx(spread, rel=0.5)  # 144 entries of rank 5
    before = roberta(ids).logits
    fold_head(roberta)
    torch.testing.assert_close(roberta.classifier.dense.weight.double(), weight.to(dtype).double())
    assert torch.equal(roberta.classifier.dense.bias, bias)
    assert torch.equal(roberta(ids).logits, before)


@pytest.mark.parametrize("bias", [True, False])
def test_a_tensor_train_follows_the_model_to_another_dtype(bias):
    torch.manual_seed(0)
    layer = TrainHeadLayer(nn.Linear(24, 31, bias=bias, dtype=torch.bfloat16), tt_rank=3)  # 31 is a prime
    assert [core.shape[1] for core in layer.cores] == [31, 4, 6]
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    x = torch.randn(2, 24)
    assert layer(x).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == layer.folded().weight.dtype == torch.bfloat16
    layer.float()
    torch.testing.assert_close(layer.folded()(x), layer(x))
    assert layer.folded().weight.dtype == torch.float32


def test_a_tensor_train_learns_through_all_of_its_cores(roberta):
    restrict_head(roberta, HeadRecipe(["dense"], tt_rank=5))
    roberta(torch.arange(5)[None]).logits.square().sum().backward()
    layer = roberta.classifier.dense
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert torch.autograd.gradcheck(
        lambda x: layer.double()(x), torch.randn(2, 12, dtype=torch.double, requires_grad=True)
    )


@pytest.mark.parametrize("kind", [{"r": 2}, {"tt_rank": 2}])
def test_the_other_layers_of_a_head_stay_or_are_trained_whole(roberta, kind):
    frozen, trained = deepcopy(roberta), deepcopy(roberta)
    restrict_head(frozen, HeadRecipe(["dense"], **kind))
    restrict_head(trained, HeadRecipe(["dense"], train_others=True, **kind))
    assert not list(frozen.classifier.out_proj.parameters())
    assert type(trained.classifier.out_proj) is nn.Linear
    assert torch.equal(frozen.classifier.out_proj.weight, trained.classifier.out_proj.weight)


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


def test_a_run_trains_a_tensor_train_in_the_head_and_saves_a_whole_one(place, tmp_path):
    recipe = load_recipe(place / "labels.yaml", [TRAIN_HEAD, f"output={tmp_path}", "trainer.learning_rate=1e-1"])
    (result,) = run_training(recipe)
    task, saved = find_task(recipe.task), tmp_path / "seed-0/adapter"
    tensors = load_file(saved / "adapter_model.safetensors")
    weight = tensors["base_model.model.classifier.weight"]
    assert not any("cores" in name and "classifier" in name for name in tensors)
    plain = replace(recipe, head=None)
    whole = adapt(load_base(plain, task, load_tokenizer(recipe, task), seed=0), plain, task)
    base = load_base(recipe, task, load_tokenizer(recipe, task), seed=0)
    set_seed(0)  # as a run does
    started = adapt(base, recipe, task)
    layer = started.base_model.model.classifier.modules_to_save["default"]
    assert result.trained_parameters == sum(p.numel() for p in started.parameters() if p.requires_grad)
    assert result.trained_parameters != sum(p.numel() for p in whole.parameters() if p.requires_grad)
    assert (weight - layer.sum()).abs().max() > 1e-2  # six steps at a rate of 0.1
    loaded = PeftModel.from_pretrained(load_base(plain, task, load_tokenizer(recipe, task), seed=1), saved)
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, weight)
    run_evaluate(recipe.model, saved, "sst2", recipe.data.test, EvaluationOptions(), tmp_path / "again", rows=6)
    again = json.loads((tmp_path / "again/results.json").read_text(encoding="utf-8"))
    assert again["metrics"] == pytest.approx(result.tests["sst2"])


SIZES = {"vocab_size": 96, "pad_token_id": 0}
# A model without its head, what an adapter targets, and what all is new in front of the labels.
MODELS = {
    "distilbert": (
        lambda: DistilBertModel(DistilBertConfig(**SIZES, dim=16, n_layers=1, n_heads=2, hidden_dim=16)),
        "q_lin",
        {"pre_classifier", "classifier"},
    ),
    "deberta": (
        lambda: DebertaV2Model(
            DebertaV2Config(**SIZES, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        ),
        "dense",  # the pooler's, too, which is not adapted but trained
        {"pooler", "classifier"},
    ),
    "xlnet": (
        lambda: XLNetModel(XLNetConfig(**SIZES, d_model=16, n_layer=1, n_head=2, d_inner=16)),
        "layer_1",
        {"sequence_summary", "logits_proj"},
    ),
}


@pytest.fixture(params=MODELS)
def other_head(request, place, tmp_path):
    """A recipe of a model whose head is called otherwise, and the names of that head's modules."""
    make, target, head = MODELS[request.param]
    set_seed(0)
    make().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    more = [f"model={tmp_path / 'model'}", f"output={tmp_path / 'run'}", f"adapter.target_modules=[{target}]"]
    return load_recipe(place / "labels.yaml", [*more, "head_learning_rate=0.5", "trainer.max_steps=1"]), head


def test_all_that_is_new_is_trained_as_the_head_and_saved(other_head, tmp_path):
    recipe, head = other_head
    splits = load_splits(recipe)
    arguments = make_arguments(recipe.trainer, splits.task, tmp_path, 0)
    trainer = make_trainer(recipe, splits, load_tokenizer(recipe, splits.task), arguments)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    at_rate = {names[id(p)] for g in trainer.create_optimizer().param_groups if g["lr"] == 0.5 for p in g["params"]}
    new = {name for name, p in trainer.model.named_parameters() if p.requires_grad and "lorta" not in name}
    assert at_rate == new
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in new} == head
    (result,) = run_training(recipe)
    saved, data = tmp_path / "run/seed-0/adapter", recipe.data.test
    found = run_evaluate(str(saved), None, "sst2", data, EvaluationOptions(), tmp_path / "again", rows=6)
    assert found.metrics == pytest.approx(result.tests["sst2"])


@pytest.mark.parametrize("other_head", ["xlnet"], indirect=True)
def test_a_head_that_an_adapter_cannot_train_is_refused(other_head):
    recipe, _ = other_head
    recipe = replace(recipe, adapter={"method": "trainable_tokens", "token_indices": [3]})
    task = find_task(recipe.task)
    base = load_base(recipe, task, load_tokenizer(recipe, task), seed=0)
    with pytest.raises(ValueError, match=r"sequence_summary, logits_proj of XLNet.* PEFT cannot train them"):
        adapt(base, recipe, task)


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
@pytest.mark.parametrize("head", [LORA_HEAD, TRAIN_HEAD])
def test_a_run_with_a_part_of_the_head_goes_on_and_is_scored_later(place, tmp_path, head):
    recipe = load_recipe(place / "labels.yaml", [head, f"output={tmp_path}"])
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
