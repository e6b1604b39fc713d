"""Merging into a residual base, in plain layers that unmerging takes away again, and making a plain model of it."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from residual_bases import adapted, assert_same_state, base_of, config_of, fresh, state_of, trained
from torch import nn
from transformers.pytorch_utils import Conv1D

from cases import MODELS, Model, logits, over_models, perturb

bitsandbytes = pytest.importorskip("bitsandbytes")
from tensorpeft import DotaConfig  # noqa: E402
from tensorpeft.quantization import dequantize, quantize_residual  # noqa: E402  # needs bitsandbytes
from tensorpeft.quantization.residual import ResidualLinear4bit  # noqa: E402

LLAMA = MODELS[0]
MERGED_TOLERANCE = 2e-6  # absolute, of float32 logits of order one
HALF_TOLERANCE = 3e-2  # the same of bfloat16, which has 8 bits of mantissa


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
    plain = dict(fresh(model).named_modules())
    for name in quantised:
        layer = unloaded.get_submodule(name)
        is_target = name.endswith(tuple(model.targets))
        assert type(layer) is (type(plain[name]) if is_target else bitsandbytes.nn.Linear4bit)
        if is_target:
            assert layer.weight.dtype == torch.float32
            assert layer.weight.shape == plain[name].weight.shape


@over_models
@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merged_layers_have_the_asked_dtype(model: Model, dtype: torch.dtype, is_merged: bool):
    peft_model = trained(model)
    if is_merged:
        peft_model.merge_adapter()
    unloaded = peft_model.merge_and_unload(dtype=dtype)
    layers = [module for name, module in unloaded.named_modules() if name.endswith(tuple(model.targets))]
    assert all(type(layer) in (nn.Linear, Conv1D) for layer in layers)
    assert {parameter.dtype for layer in layers for parameter in layer.parameters()} == {dtype}


def test_refused_merge_in_another_dtype_does_not_change_the_next_one():
    peft_model = adapted(LLAMA)
    layer = peft_model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    core = layer.updates["default"].core_1.data
    kept = core.clone()
    core.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        peft_model.merge_and_unload(safe_merge=True, dtype=torch.bfloat16)
    core.copy_(kept)
    peft_model.merge_adapter()
    assert layer.base_layer.weight.dtype == torch.float32


@over_models
def test_merging_in_a_model_of_another_dtype_than_was_quantised(model: Model):
    peft_model = trained(model, base_of(model).to(torch.bfloat16))
    before = logits(peft_model)
    peft_model.merge_adapter()
    torch.testing.assert_close(logits(peft_model), before, atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE)
    unloaded = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(unloaded), before, atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE)


@over_models
def test_dequantising_a_model_of_another_dtype_than_was_quantised(model: Model):
    base = base_of(model).to(torch.bfloat16)
    before = logits(base)
    torch.testing.assert_close(logits(dequantize(base)), before, atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE)


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
    original = fresh(model)
    assert [type(module) for module in plain.modules()] == [type(module) for module in original.modules()]
    assert list(plain.state_dict()) == list(original.state_dict())
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path)), logits(plain))


@over_models
def test_dequantised_model_has_the_asked_dtype(model: Model):
    plain, expected = dequantize(base_of(model), dtype=torch.bfloat16), logits(base_of(model))
    for name, buffer in plain.named_buffers():  # what is not saved, such as the frequencies of positions, stays
        assert buffer.dtype != torch.bfloat16 or name in plain.state_dict()
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(plain).float(), expected, atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE)


def test_dequantising_after_an_evaluation_reads_the_weight_in_its_own_order():
    """On AVX512, bitsandbytes repacks a plain 4-bit weight at the first forward in evaluation."""
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)
    model = nn.Sequential(layer).to("cpu").train()
    x = torch.randn(5, 128)
    expected = model(x)  # not repacked yet
    with torch.no_grad():
        model.eval()(x)
    plain = dequantize(model)
    assert type(plain[0]) is nn.Linear
    # Repacking rounds the blocks' scales to bfloat16, for good.
    torch.testing.assert_close(plain(x), expected, atol=2e-2, rtol=2e-2)


@over_models
def test_copy_of_a_merged_model_unmerges(model: Model):
    peft_model = trained(model)
    before, state = logits(peft_model), state_of(peft_model)
    peft_model.merge_adapter()
    for copied in (copy.deepcopy(peft_model), pickle.loads(pickle.dumps(peft_model))):
        copied.unmerge_adapter()
        assert_same_state(copied, state)
        assert torch.equal(logits(copied), before)


def test_a_mixed_model_on_conv1d_merges_and_unmerges():
    """The plain layer that takes the residual one's place stores its weight the other way round."""
    gpt2 = next(model for model in MODELS if model.name == "gpt2-conv1d")
    config = DotaConfig(r=6, num_cores=3, target_modules=["c_attn", "c_proj"])  # c_proj is square
    base = quantize_residual(gpt2.fresh(), config)
    mixed = get_peft_model(base, config, mixed=True).eval()
    perturb(mixed)
    before = logits(mixed)
    for _ in range(2):
        mixed.merge_adapter()
        assert torch.allclose(logits(mixed), before, atol=MERGED_TOLERANCE)
        mixed.unmerge_adapter()
        assert torch.allclose(logits(mixed), before, atol=MERGED_TOLERANCE)
