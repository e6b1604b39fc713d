import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cases import MODELS, logits, perturb, tiny_llama
from evaluation.evaluated import word_tokenizer
from tensorpeft import DotaConfig
from tensorpeft.export import to_dense
from tensorpeft.loading import errors
from tensorpeft.loading.adapters import find_base, load_model, load_on_skeleton, put_adapter
from tensorpeft.loading.architectures import build_empty, find_class
from tensorpeft.loading.models import load_as_saved, load_config, load_pretrained, load_tokenizer
from tensorpeft.loading.texts import first_lines
from tensorpeft.studies.plan import plan_model
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.models import adapt, load_base
from tensorpeft.training.recipe import DataRecipe, Recipe


@pytest.fixture
def saved(tmp_path):
    """A base, and an adapter that names it."""
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nope", r"^/nope: no folder of that name. Pass that of a transformers model, a .gguf file, or OWNER/NAME"),
        ("./nope", r"^./nope: no folder of that name."),
        ("nope/nope", r"^nope/nope: no folder of that name, and .*while HF_HUB_OFFLINE is set. Pass a path, or unset"),
        ("{}/file.txt", r"file.txt: a file. Pass a folder"),
    ],
)
def test_what_is_not_there_is_said_in_one_way(tmp_path, monkeypatch, name, message):
    (tmp_path / "file.txt").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = name.format(tmp_path)
    for load in (
        load_config,
        load_tokenizer,
        load_as_saved,
        plan_model,
        lambda name: load_pretrained(AutoModelForCausalLM, name),
    ):
        with pytest.raises(ValueError, match=message):
            load(name)


def test_a_hub_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setattr(errors, "is_offline_mode", lambda: False)
    with (
        pytest.raises(ValueError, match=r"not to be had from the Hub: We couldn't connect.*hf auth login") as raised,
        errors.explained("nope/nope"),
    ):
        raise OSError("We couldn't connect.\nSee the documentation.")
    assert "documentation" not in str(raised.value)


def test_folders_without_a_model_or_its_weights(saved):
    (saved / "empty").mkdir()
    for load in (load_config, load_as_saved, lambda name: load_pretrained(AutoModelForCausalLM, name)):
        with pytest.raises(ValueError, match=r"empty: no config.json in this folder, and not one .gguf file"):
            load(saved / "empty")
    with pytest.raises(ValueError, match="base: no tokenizer that transformers can load"):
        load_tokenizer(saved / "base")
    (saved / "base/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base: this folder cannot be loaded: .*model.safetensors"):
        load_as_saved(saved / "base")


def test_the_class_is_one_that_transformers_registers(saved):
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    assert find_class(config, "a") is LlamaForCausalLM
    assert type(load_as_saved(saved / "base")) is LlamaForCausalLM
    assert build_empty(find_class(LlamaConfig(num_hidden_layers=1), "a"), LlamaConfig(num_hidden_layers=1)).device == (
        torch.device("meta")
    )
    for name in ("Mystery", "set_seed", "LlamaConfig", "pipeline", "AutoModel"):
        with pytest.raises(ValueError, match=rf"a: transformers has no class '{name}'"):
            find_class(LlamaConfig(architectures=[name]), "a")
    with pytest.raises(ValueError, match=r"a: transformers has no class \['LlamaForCausalLM'\]"):
        find_class(LlamaConfig(architectures=[["LlamaForCausalLM"]]), "a")


def test_an_adapter_is_put_on_its_base_without_making_its_start_anew(tmp_path, monkeypatch):
    adapted = get_peft_model(MODELS[0].fresh(), DotaConfig(r=2, num_cores=3, target_modules=["q_proj"]))
    perturb(adapted)
    adapted.save_pretrained(tmp_path)
    monkeypatch.setattr("tensorpeft.methods.dota.decomposition_steps", None)
    loaded = put_adapter(MODELS[0].fresh(), str(tmp_path), "base")
    found, saved = get_peft_model_state_dict(loaded), get_peft_model_state_dict(adapted)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key]) for key in saved)


def test_an_adapter_s_own_tokenizer_is_found_in_its_folder_and_on_the_hub(saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(saved / "hub"))
    word_tokenizer(bos=True).save_pretrained(saved / "base")
    hub = saved / "hub" / "models--owner--adapter"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("1" * 40)
    shutil.copytree(saved / "adapter", hub / "snapshots" / ("1" * 40))
    for folder, name in (
        (saved / "adapter", str(saved / "adapter")),
        (hub / "snapshots" / ("1" * 40), "owner/adapter"),
    ):
        base, adapter = find_base(name, None)
        assert load_model(base, adapter, None)[1].chat_template is None  # the base's
        tokenizer = word_tokenizer(bos=True)
        tokenizer.chat_template = "{{ 'OWN' }}"
        tokenizer.save_pretrained(folder)
        assert load_model(base, adapter, None)[1].chat_template == "{{ 'OWN' }}"


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_what_is_trained_in_full_has_the_base_s_dtype(task_type, tmp_path):
    model = next(model for model in MODELS if model.task_type == task_type)
    more = {} if task_type == "SEQ_CLS" else {"modules_to_save": ["lm_head"]}
    config = DotaConfig(r=2, num_cores=3, target_modules=model.targets, task_type=task_type, **more)
    get_peft_model(model.fresh(), config).save_pretrained(tmp_path)
    loaded = put_adapter(model.fresh().to(torch.bfloat16), str(tmp_path), "base").eval()
    assert logits(loaded).dtype == torch.bfloat16


def test_only_a_line_feed_ends_a_line(tmp_path):
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}, {"text": "e"}]
    lines = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{lines}", encoding="utf-8", newline="")
    assert [json.loads(line) for line in first_lines(tmp_path / "rows.jsonl", 2)] == rows[:2]


OF_ONE_MODEL = """
import sys
from transformers import LlamaConfig
from tensorpeft.loading.architectures import find_class
before = set(sys.modules)
find_class(LlamaConfig(architectures=["LlamaForCausalLM"]), "a")
print(*sorted(name for name in set(sys.modules) - before if ".modeling_" in name and ".models." in name))
"""


def test_only_the_model_that_is_asked_for_is_imported():
    done = subprocess.run([sys.executable, "-c", OF_ONE_MODEL], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["transformers.models.llama.modeling_llama"], done.stderr


def test_an_adapter_names_its_class_but_no_module_to_import(saved):
    config = load_on_skeleton(saved / "adapter").peft_config["default"]
    assert type(load_as_saved(str(saved / "base"), config)) is LlamaForCausalLM
    mapping = {"base_model_class": "LlamaModel", "parent_library": "no_such_library"}
    change(saved / "adapter/adapter_config.json", auto_mapping=mapping, target_modules=["q_proj"])
    adapted = load_on_skeleton(saved / "adapter")
    assert type(adapted.get_base_model()).__name__ == "LlamaModel"
    change(saved / "adapter/adapter_config.json", auto_mapping={**mapping, "base_model_class": "system"})
    with pytest.raises(ValueError, match="transformers has no class 'system'"):
        load_on_skeleton(saved / "adapter")


def test_a_base_that_is_gone_has_to_be_passed(saved):
    assert find_base(str(saved / "adapter"), None) == (str(saved / "base"), str(saved / "adapter"))
    (saved / "base").rename(saved / "moved")
    with pytest.raises(ValueError, match=r"adapter: its base model is no longer in .*base. Pass .*\(--base\)"):
        find_base(str(saved / "adapter"), None)
    with pytest.raises(ValueError, match=r"no longer in .*base. Load the adapter on its model"):
        load_on_skeleton(saved / "adapter")
    assert find_base(str(saved / "moved"), str(saved / "adapter")) == (str(saved / "moved"), str(saved / "adapter"))


def put_on_hub(model, cache, commit: str, *names: str) -> None:
    """As if `owner/model` had been downloaded at a commit, which has these names."""
    folder = cache / "models--owner--model"
    model.save_pretrained(folder / "snapshots" / commit)
    word_tokenizer(bos=True).save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    for name in names:
        (folder / "refs" / name).write_text(commit)


def test_the_base_is_loaded_at_the_revision_that_the_adapter_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(1)
    old = tiny_llama(num_hidden_layers=3)
    put_on_hub(old, tmp_path, "1" * 40, "v1")
    put_on_hub(tiny_llama(), tmp_path, "2" * 40, "main")
    adapter = {"method": "lorta", "r": 2, "target_modules": ["q_proj"]}
    recipe = Recipe(
        "owner/model", "instructions", DataRecipe("train.json", 1), adapter, model_arguments={"revision": "v1"}
    )
    task = find_task(recipe.task)
    adapted = adapt(load_base(recipe, task, None, seed=0), recipe, task).eval()
    perturb(adapted)
    adapter = str(tmp_path / "adapter")
    adapted.save_pretrained(adapter)
    found, saved = find_base(adapter, None)
    assert torch.equal(logits(load_model(found, saved, None)[0]), logits(adapted))
    assert load_on_skeleton(adapter).config.num_hidden_layers == 3
    torch.testing.assert_close(logits(to_dense(adapter, tmp_path / "dense", torch.float32)), logits(adapted))
    assert load_as_saved("owner/model").config.num_hidden_layers == 2
