"""Merging a residual base, copying it, saving and loading it and its adapters."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from residual_bases import adapted, base_of, config_of, trained
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from cases import MODELS, Model, logits, over_models, perturb, tokens
from tensorpeft.plugin.layer import TensorLayer

bitsandbytes = pytest.importorskip("bitsandbytes")
from tensorpeft.quantization import dequantize  # noqa: E402  # needs bitsandbytes
from tensorpeft.quantization.residual import ResidualLinear4bit  # noqa: E402

LLAMA = MODELS[0]
MERGED_TOLERANCE = 2e-6  # absolute, of float32 logits of order one
FILE = "adapter_model.safetensors"


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(expected)
    assert {value.dtype for value in found.values()} == {value.dtype for value in expected.values()}
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def four_bit_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


@over_models
def test_merging_keeps_the_output_and_unmerging_the_base(model: Model):
    peft_model = trained(model)
    before, state = logits(peft_model), state_of(peft_model)
    peft_model.merge_adapter(safe_merge=True)
    assert not any(isinstance(module, ResidualLinear4bit) for module in peft_model.modules())
    assert torch.allclose(logits(peft_model), before, atol=MERGED_TOLERANCE, rtol=0)
    peft_model.unmerge_adapter()
    assert_same_state(peft_model, state)
    assert torch.equal(logits(peft_model), before)


@over_models
def test_adapters_merged_one_after_the_other_add_up(model: Model):
    config = config_of(model, task_type=None)  # with one, PEFT trains BERT's head, and allows one active adapter only
    peft_model = get_peft_model(base_of(model), config).eval()
    peft_model.add_adapter("second", config)
    peft_model.base_model.set_adapter(["default", "second"])
    perturb(peft_model)
    before, state = logits(peft_model), state_of(peft_model)
    for name in ("default", "second"):
        peft_model.merge_adapter([name])
    assert torch.allclose(logits(peft_model), before, atol=MERGED_TOLERANCE, rtol=0)
    peft_model.unmerge_adapter()
    assert_same_state(peft_model, state)
    assert torch.equal(logits(peft_model), before)


@over_models
def test_merging_and_unloading_leaves_plain_layers_where_the_targets_were(model: Model):
    peft_model = trained(model)
    before, quantised = logits(peft_model), four_bit_layers(base_of(model))
    unloaded = peft_model.merge_and_unload()
    assert torch.allclose(logits(unloaded), before, atol=MERGED_TOLERANCE, rtol=0)
    plain = dict(model.fresh().named_modules())
    for name in quantised:
        layer = unloaded.get_submodule(name)
        is_target = name.endswith(tuple(model.targets))
        assert type(layer) is (type(plain[name]) if is_target else bitsandbytes.nn.Linear4bit)
        if is_target:
            assert layer.weight.dtype == torch.float32
            assert layer.weight.shape == plain[name].weight.shape


@over_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merged_layers_have_the_asked_dtype(model: Model, dtype: torch.dtype):
    unloaded = trained(model).merge_and_unload(dtype=dtype)
    layers = [module for name, module in unloaded.named_modules() if name.endswith(tuple(model.targets))]
    assert all(type(layer) in (nn.Linear, Conv1D) for layer in layers)
    assert {parameter.dtype for layer in layers for parameter in layer.parameters()} == {dtype}


@over_models
def test_unloading_gives_the_base_back(model: Model):
    peft_model = trained(model)
    peft_model.merge_adapter()
    base = base_of(model)
    unloaded = peft_model.unload()
    assert_same_state(unloaded, state_of(base))
    assert torch.equal(logits(unloaded), logits(base))


@over_models
def test_dequantised_model_is_a_plain_one(model: Model, tmp_path: Path):
    merged = trained(model).merge_and_unload()
    before = logits(merged)
    plain = dequantize(merged)
    assert torch.allclose(logits(plain), before, atol=MERGED_TOLERANCE, rtol=0)
    fresh = model.fresh()
    assert [type(module) for module in plain.modules()] == [type(module) for module in fresh.modules()]
    assert list(plain.state_dict()) == list(fresh.state_dict())
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path)), logits(plain))


@over_models
def test_dequantised_model_has_the_asked_dtype(model: Model):
    plain = dequantize(base_of(model), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(
        logits(plain).float(), logits(base_of(model)), atol=3e-2, rtol=3e-2
    )  # 8 bits of mantissa


@over_models
def test_partly_merged_base_is_not_saved(model: Model, tmp_path: Path):
    merged = trained(model).merge_and_unload()
    with pytest.raises(ValueError, match=r"layers are merged, such as .*dequantize\(model\) first"):
        merged.save_pretrained(tmp_path / "base")
    assert not list(tmp_path.rglob("*.*"))


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


@over_models
def test_copy_of_a_merged_model_unmerges(model: Model):
    peft_model = trained(model)
    before, state = logits(peft_model), state_of(peft_model)
    peft_model.merge_adapter()
    for copied in (copy.deepcopy(peft_model), pickle.loads(pickle.dumps(peft_model))):
        copied.unmerge_adapter()
        assert_same_state(copied, state)
        assert torch.equal(logits(copied), before)
