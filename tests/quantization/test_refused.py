"""What a residual base cannot do ends in an error that names the layer and the remedy, and changes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from residual_bases import adapted, assert_same_state, base_of, config_of, fresh, state_of, trained
from torch import nn

from cases import MODELS, Model, logits, over_models, perturb
from tensorpeft import DotaConfig, LortaConfig

pytest.importorskip("bitsandbytes")
from tensorpeft.quantization import dequantize, quantize_residual  # needs bitsandbytes

LLAMA = MODELS[0]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards a model has the modules, tensors and output that it had before."""

    def look():
        modules = [(name, type(module), module.training) for name, module in model.named_modules()]
        return modules, hasattr(model, "peft_config"), getattr(model, "hf_quantizer", None)

    before, state, output = look(), state_of(model), logits(model)
    yield
    assert look() == before
    assert_same_state(model, state)
    assert torch.equal(logits(model), output)


def save(peft_model: PeftModel, folder: Path) -> Path:
    peft_model.save_pretrained(folder)
    return folder


def first_target(model: Model) -> str:
    """The name of the first layer that an adapter is on."""
    return next(name for name, _ in fresh(model).named_modules() if name.endswith(tuple(model.targets)))


@over_models
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_of_another_residual_base(model: Model, low_cpu_mem_usage: bool, tmp_path: Path):
    folder, base = save(trained(model, base_of(model, rounds=3)), tmp_path), base_of(model)
    message = rf"{first_target(model)}: .*on the residual base \w+…, .*has the residual base .*Load it on the very base"
    with unchanged(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)


@over_models
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_of_a_residual_base_on_the_plain_model(model: Model, low_cpu_mem_usage: bool, tmp_path: Path):
    folder, plain = save(trained(model), tmp_path), fresh(model)
    message = rf"{first_target(model)}: .*on a residual base, .*has a base without a residual"
    with unchanged(plain), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(plain, folder, low_cpu_mem_usage=low_cpu_mem_usage)


@over_models
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_of_the_plain_model_on_a_residual_base(model: Model, low_cpu_mem_usage: bool, tmp_path: Path):
    folder, base = save(trained(model, fresh(model)), tmp_path), base_of(model)
    message = rf"{first_target(model)}: .*on a base without a residual, .*has the residual base"
    with unchanged(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)


def test_refused_second_adapter_leaves_the_first(tmp_path: Path):
    folder, peft_model = save(trained(LLAMA, base_of(LLAMA, rounds=3)), tmp_path), trained(LLAMA)
    with unchanged(peft_model), pytest.raises(ValueError, match=r"q_proj: .*Load it on the very base"):
        peft_model.load_adapter(folder, "second")
    assert list(peft_model.peft_config) == ["default"]


@over_models
@pytest.mark.parametrize("other", [{"r": 4}, {"num_cores": 2}, {"modes": {24: [2, 2, 6]}}], ids=str)
def test_configuration_of_other_cores_than_the_base_has(model: Model, other: dict):
    base = base_of(model)
    message = rf"{first_target(model)}: .*\(1, .* but this configuration asks for .*Use the r, num_cores and modes"
    with unchanged(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, config_of(model, **other))


def test_another_method_has_no_cores_to_subtract():
    model = fresh(LLAMA)
    with unchanged(model), pytest.raises(ValueError, match=r"LortaConfig makes CpUpdate. Pass a DotaConfig"):
        quantize_residual(model, LortaConfig(r=4, target_modules=LLAMA.targets))


@over_models
def test_no_layer_matches(model: Model):
    plain = fresh(model)
    with unchanged(plain), pytest.raises(ValueError, match=r"no layer of the model matches.*no_such_layer"):
        quantize_residual(plain, DotaConfig(target_modules=["no_such_layer"]))


def test_target_that_is_not_linear():
    model = fresh(LLAMA)
    with unchanged(model), pytest.raises(ValueError, match=r"embed_tokens: cannot adapt a Embedding"):
        quantize_residual(model, config_of(LLAMA, target_modules=["q_proj", "embed_tokens"]))


@over_models
def test_quantised_models_and_those_with_adapters_are_not_quantised(model: Model):
    for made in (
        base_of(model),
        trained(model),
        trained(model, fresh(model)),
        trained(model, fresh(model)).base_model,
    ):
        with (
            unchanged(made),
            pytest.raises(ValueError, match=r"quantised or has adapters already.*before get_peft_model"),
        ):
            quantize_residual(made, config_of(model))


def test_no_rounds():
    model = fresh(LLAMA)
    with unchanged(model), pytest.raises(ValueError, match="rounds=0: expected at least 1"):
        quantize_residual(model, config_of(LLAMA), rounds=0)


def test_weight_that_is_not_finite():
    model = fresh(LLAMA)
    weight = model.get_submodule("model.layers.1.self_attn.q_proj").weight.data
    kept = weight.clone()
    with unchanged(model):
        weight[3, 4] = float("nan")
        with pytest.raises(ValueError, match="the weight is not finite") as raised:
            quantize_residual(model, config_of(LLAMA))
        weight.copy_(kept)
    assert "model.layers.1.self_attn.q_proj: " in str(raised.value)


@over_models
def test_dequantising_under_adapters(model: Model):
    peft_model = trained(model)
    for made in (peft_model, peft_model.get_base_model()):
        with unchanged(made), pytest.raises(ValueError, match=r"has adapters. Call merge_and_unload\(\)"):
            dequantize(made)


@over_models
def test_broken_adapter_is_not_merged(model: Model):
    peft_model = adapted(model)
    perturb(peft_model)
    layer = peft_model.get_base_model().get_submodule(first_target(model))
    kept = layer.updates["default"].core_1[0, 0, 0, 0].clone()
    for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with unchanged(peft_model):
            layer.updates["default"].core_1.data[0, 0, 0, 0] = float("nan")
            with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
                merge(safe_merge=True)
            layer.updates["default"].core_1.data[0, 0, 0, 0] = kept


def test_layers_are_not_offloaded(tmp_path):
    base_of(LLAMA).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\['0', 'disk'\]: a 4-bit layer cannot be offloaded"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map={"model": "disk", "lm_head": 0})


def test_a_weight_in_double_precision_is_named():
    model = fresh(LLAMA).double()
    with unchanged(model), pytest.raises(ValueError, match=r"q_proj: cannot quantise a weight in torch.float64"):
        quantize_residual(model, config_of(LLAMA))


def test_what_peft_trains_in_full_is_not_quantised():
    """PEFT compares the ends of names: DistilBERT's `pre_classifier` counts as a `classifier`."""
    torch.manual_seed(0)
    small = {"dim": 24, "hidden_dim": 44, "n_layers": 1, "n_heads": 4, "vocab_size": 96}
    model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**small))
    config = DotaConfig(r=4, num_cores=3, target_modules=["q_lin"], task_type="SEQ_CLS")
    adapted = get_peft_model(quantize_residual(model, config), config)
    assert any(p.requires_grad for name, p in adapted.named_parameters() if "pre_classifier" in name)
