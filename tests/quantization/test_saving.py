"""Saving and loading a residual base, and what goes into the file of an adapter on it; copies in memory."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from residual_bases import adapted, assert_same_state, base_of, config_of, fresh, state_of, trained
from safetensors.torch import load_file
from transformers import AutoModel

from cases import MODELS, Model, logits, over_models, perturb, tokens
from tensorpeft.plugin.layer import TensorLayer
from tensorpeft.quantization.quantizer import check_complete, replace_layers

pytest.importorskip("bitsandbytes")

LLAMA = MODELS[0]
FILE = "adapter_model.safetensors"


@over_models
def test_partly_merged_base_is_not_saved(model: Model, tmp_path: Path):
    merged = trained(model).merge_and_unload()
    with pytest.raises(ValueError, match=r"layers are merged, such as .*dequantize\(model\) first"):
        merged.save_pretrained(tmp_path / "base")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@over_models
def test_saved_base_is_loaded_bit_for_bit_and_saved_again(model: Model, tmp_path: Path):
    base = base_of(model)
    logits(base)
    saved = base
    for folder in (tmp_path / "first", tmp_path / "second"):
        saved.save_pretrained(folder)
        saved = type(base).from_pretrained(folder)
        assert_same_state(saved, state_of(base))
        assert torch.equal(logits(saved), logits(base))
    peft_model = trained(model)
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(saved, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(peft_model))


@over_models
def test_loaded_in_bfloat16_the_cores_stay_and_the_start_is_exact(model: Model, tmp_path: Path):
    base = base_of(model)
    base.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path, dtype=torch.bfloat16)
    moved = base.to(torch.bfloat16)
    for half in (loaded, moved):
        cores = {name: buffer for name, buffer in half.named_buffers() if ".start.core_" in name}
        assert {core.dtype for core in cores.values()} == {torch.float32}
        expected = logits(half)
        assert expected.dtype == torch.bfloat16
        peft_model = adapted(model, half)
        assert torch.equal(logits(peft_model), expected)
        assert torch.equal(peft_model(input_ids=tokens()).logits, expected)
    assert torch.equal(logits(loaded), logits(moved))


def test_base_is_loaded_without_its_head(tmp_path: Path):
    base = base_of(LLAMA)
    base.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = base.model(tokens()).last_hidden_state
        assert torch.equal(body(tokens()).last_hidden_state, expected)


def test_adapter_finds_its_base_by_the_folder(tmp_path: Path):
    base_of(LLAMA).save_pretrained(tmp_path / "base")
    peft_model = trained(LLAMA, type(fresh(LLAMA)).from_pretrained(tmp_path / "base"))
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(peft_model))


@over_models
def test_adapter_added_by_transformers_is_saved_and_loaded(model: Model, tmp_path: Path):
    base = base_of(model)
    base.add_adapter(config_of(model))
    perturb(base)
    base.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = base_of(model)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(base.eval()))


@over_models
def test_adapter_file_has_the_trained_cores_and_the_digest_alone(model: Model, tmp_path: Path):
    peft_model = trained(model)
    peft_model.save_pretrained(tmp_path)
    layers = [module for module in peft_model.modules() if isinstance(module, TensorLayer)]
    cores = {key: tensor for key, tensor in load_file(tmp_path / FILE).items() if "dota_update" in key}
    names = ["base_digest", "core_1", "core_2", "core_3"]
    assert sorted(key.rsplit(".", 1)[-1] for key in cores) == sorted(names * len(layers))
    header = 8 + 256 * len(load_file(tmp_path / FILE))  # a name, a dtype, a shape and a place of each tensor
    trainable, _ = peft_model.get_nb_trainable_parameters()
    assert (tmp_path / FILE).stat().st_size <= 1.05 * (4 * trainable + 32 * len(layers)) + header


@over_models
def test_copies_are_independent_and_start_from_their_own_base(model: Model):
    peft_model = trained(model)
    before = logits(peft_model)
    for copied in (copy.deepcopy(peft_model), pickle.loads(pickle.dumps(peft_model))):
        assert torch.equal(logits(copied), before)
        layers = [module for module in copied.modules() if isinstance(module, TensorLayer)]
        for layer in layers:
            assert layer.updates["default"].base_start is layer.get_base_layer().start
        layers[0].get_base_layer().start.core_1.mul_(2)  # the start is gone from what the adapter multiplies by
        assert torch.equal(logits(copied), before)
        with copied.disable_adapter():
            assert not torch.allclose(logits(copied), logits(base_of(model)))
        perturb(copied, seed=9)
        assert not torch.allclose(logits(copied), before)
        assert torch.equal(logits(peft_model), before)
        with peft_model.disable_adapter():
            assert torch.equal(logits(peft_model), logits(base_of(model)))


def test_a_model_is_walked_once_for_the_names_of_all_its_layers(monkeypatch):
    base, skeleton, walks = base_of(LLAMA), fresh(LLAMA), []
    config, walk = base.config.quantization_config, type(base).named_modules
    for tensor in (*base.parameters(), *base.buffers()):
        tensor._is_hf_initialized = True
    for model in (base, skeleton):
        monkeypatch.setattr(model, "named_modules", lambda model=model: walks.append(model) or walk(model))
    assert len([*config.residuals, *config.nf4]) > 2
    replace_layers(skeleton, config)
    check_complete(base, config)
    assert walks == [skeleton, base]
    base.hf_quantizer.get_state_dict_and_metadata(base)
    assert len(walks) == 4  # it looks at the layers as well
