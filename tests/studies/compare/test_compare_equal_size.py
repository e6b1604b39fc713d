"""The model on which sizes are counted: of the same modules as the one that is trained, and not loaded for that."""

import dataclasses
import json
import shutil

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from tensorpeft.studies.compare import equal_size
from tensorpeft.studies.compare.entries import load_entries
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.models import load_base, load_tokenizer


def modules(model):
    """The modules and the shapes of a model's tensors, by name."""
    tensors = {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return {name: type(module) for name, module in model.named_modules()}, tensors


@pytest.fixture
def recipe_of(place, asked):
    """A recipe for a task."""

    def recipe_of(task, *overrides):
        path = place / "some.yaml" if task in ("sst2", "stsb") else asked / "asked.yaml"
        return load_entries(path, overrides=[f"task={task}", *overrides]).recipe

    return recipe_of


@pytest.mark.parametrize("task", ["sst2", "stsb", "signatures", "preferences"])
def test_nothing_is_loaded_to_count(task, recipe_of, monkeypatch):
    recipe, task = recipe_of(task, "model_arguments.dtype=bfloat16"), find_task(task)
    loaded = load_base(recipe, task, load_tokenizer(recipe, task), seed=0)
    monkeypatch.setattr(equal_size, "load_base", None)
    empty = equal_size._skeleton(recipe, task)
    assert modules(empty) == modules(loaded)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_a_model_that_its_configuration_does_not_tell_is_loaded(recipe_of, tmp_path, monkeypatch):
    class LoadedError(Exception):
        pass

    def load(*arguments, **more):
        raise LoadedError

    monkeypatch.setattr(equal_size, "load_base", load)
    recipe, task = recipe_of("sst2"), find_task("sst2")
    shutil.copytree(recipe.model, tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}", encoding="utf-8")
    shutil.copytree(recipe.model, tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    others = [{"model": str(tmp_path / name)} for name in ("adapted", "quantised")]
    for other in [*others, {"model_arguments": {"num_hidden_layers": 1}}]:
        with pytest.raises(LoadedError):
            equal_size._skeleton(dataclasses.replace(recipe, **other), task)
