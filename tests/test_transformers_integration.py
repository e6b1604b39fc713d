"""The other doors to an adapter: transformers' own methods, PEFT's Auto classes, and models that mix methods."""

from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from cases import CASES, MODELS, logits, over_cases, over_identity_cases, over_models, over_pairs, perturb, tokens

DENSE_TOLERANCE = {"rtol": 0, "atol": 1e-11}  # in float64, of logits of order one: sums in another order
AUTO_CLASSES = {"CAUSAL_LM": AutoPeftModelForCausalLM, "SEQ_CLS": AutoPeftModelForSequenceClassification}
LLAMA = MODELS[0]

over_orders = pytest.mark.parametrize(
    "order", [("my-lora", "my-dota"), ("my-dota", "my-lora")], ids=["lora-first", "dota-first"]
)
over_dota_targets = pytest.mark.parametrize(
    "dota_targets",
    [["q_proj", "v_proj"], ["v_proj", "up_proj"], ["up_proj", "down_proj"]],
    ids=["same", "some", "other"],
)


def config_of(model, case, **more):
    return case.make(target_modules=model.targets, **more)


def trained(model, case, **more):
    """A PeftModel in evaluation mode whose adapter has left its start, which is not quite what we would compute.

    That start is another machine's: it must come from the file.
    """
    adapted = get_peft_model(model.fresh(), config_of(model, case, **more)).eval()
    perturb(adapted)
    for name, buffer in adapted.named_buffers():
        if ".start_" in name:
            buffer += 1e-3
    return adapted


@over_models
@over_identity_cases
def test_an_adapter_added_by_transformers_starts_at_the_base(model, case):
    plain = model.fresh()
    plain.add_adapter(config_of(model, case))
    assert torch.equal(logits(plain), logits(model.fresh()))


@over_pairs(MODELS, CASES)
def test_an_adapter_added_by_transformers_is_the_peft_models(model, case):
    plain = model.fresh()
    torch.manual_seed(3)
    plain.add_adapter(config_of(model, case))
    adapted = model.fresh()
    torch.manual_seed(3)
    adapted = get_peft_model(adapted, config_of(model, case)).eval()
    for with_adapter in (plain, adapted):
        perturb(with_adapter)
    assert torch.equal(logits(plain), logits(adapted))
    trainable = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert trainable == {
        name for name, parameter in adapted.get_base_model().named_parameters() if parameter.requires_grad
    }


@over_pairs(MODELS, CASES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_loaded_by_transformers_is_the_saved_one(model, case, low_cpu_mem_usage, tmp_path):
    adapted = trained(model, case)
    adapted.save_pretrained(tmp_path)
    plain = model.fresh()
    plain.load_adapter(str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(plain), logits(adapted))


@over_cases
def test_a_saved_transformers_model_brings_its_adapter(case, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    LLAMA.fresh().save_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    plain.add_adapter(config_of(LLAMA, case))
    perturb(plain)
    plain.save_pretrained(adapter)
    assert not (adapter / "model.safetensors").exists()
    expected = logits(plain)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter).eval()), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), adapter).eval()), expected)


@over_cases
def test_transformers_switches_between_adapters_and_the_base(case, tmp_path):
    plain, expected = LLAMA.fresh(), {}
    for seed, name in enumerate(("first", "second")):
        adapted = trained(LLAMA, case)
        perturb(adapted, seed=seed)
        adapted.save_pretrained(tmp_path / name)
        plain.load_adapter(str(tmp_path / name), adapter_name=name)
        expected[name] = logits(adapted)
    assert not torch.equal(expected["first"], expected["second"])
    for name in ("first", "second", "first"):
        plain.set_adapter(name)
        assert plain.active_adapters() == [name]
        assert torch.equal(logits(plain), expected[name])
    plain.disable_adapters()
    assert torch.equal(logits(plain), logits(LLAMA.fresh()))
    plain.enable_adapters()
    assert torch.equal(logits(plain), expected["first"])
    plain.delete_adapter("first")
    plain.set_adapter("second")
    assert torch.equal(logits(plain), expected["second"])


@over_pairs(MODELS, CASES)
def test_an_auto_class_finds_the_base_and_loads_the_adapter(model, case, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.fresh().save_pretrained(base)
    adapted = trained(model, case, task_type=model.task_type)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)  # a trained head
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(adapter)
    more = {"num_labels": 3} if model.task_type == "SEQ_CLS" else {}
    loaded = AUTO_CLASSES[model.task_type].from_pretrained(adapter, **more).eval()
    assert torch.equal(logits(loaded), logits(adapted))


def mixed_configs(order, dota_targets):
    """A LoRA and a DoTA, as `{adapter name: configuration}` in the given order."""
    configs = {
        "my-lora": LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "my-dota": CASES[0].make(target_modules=dota_targets),
    }
    return {name: configs[name] for name in order}


def mix(configs):
    """A PeftMixedModel in float64 and evaluation mode, both adapters trained and active."""
    mixed, names = LLAMA.fresh(), list(configs)
    torch.manual_seed(4)
    for name in names:
        if isinstance(mixed, PeftMixedModel):
            mixed.add_adapter(name, configs[name])
        else:
            mixed = get_peft_model(mixed, configs[name], adapter_name=name, mixed=True)
    mixed.set_adapter(names)
    perturb(mixed)
    return mixed.double().eval()


def dense_logits(mixed, names):
    """The logits of a plain model whose weights have the named adapters' updates added to them."""
    dense = LLAMA.fresh().double()
    with torch.no_grad():
        for name, module in mixed.base_model.model.named_modules():
            weight = (
                dense.get_submodule(name.replace(".base_layer", "")).weight if hasattr(module, "base_layer") else None
            )
            if "my-lora" in names and "my-lora" in getattr(module, "lora_A", {}):
                weight += module.scaling["my-lora"] * module.lora_B["my-lora"].weight @ module.lora_A["my-lora"].weight
            if "my-dota" in names and "my-dota" in getattr(module, "dota_update", {}):
                weight += module.dota_update["my-dota"].matrix()
    return logits(dense)


def assert_active(mixed, names):
    """`mixed` computes with the named adapters and no other."""
    torch.testing.assert_close(logits(mixed), dense_logits(mixed, names), **DENSE_TOLERANCE)


@over_orders
@over_dota_targets
def test_any_adapters_of_a_mixed_model_can_be_active(order, dota_targets):
    mixed = mix(mixed_configs(order, dota_targets))
    for names in (["my-lora", "my-dota"], ["my-lora"], ["my-dota"], ["my-dota", "my-lora"]):
        mixed.set_adapter(names)
        assert_active(mixed, names)
        trainable = {name for name, parameter in mixed.named_parameters() if parameter.requires_grad}
        assert {"my-lora" if ".lora_" in name else "my-dota" for name in trainable} == set(names)
    outputs = [dense_logits(mixed, names) for names in ([], ["my-lora"], ["my-dota"], ["my-lora", "my-dota"])]
    for k, output in enumerate(outputs):  # all four differ
        assert not any(torch.allclose(output, other, atol=1e-4) for other in outputs[:k])


@over_orders
@over_dota_targets
def test_a_mixed_model_starts_at_the_base(order, dota_targets):
    configs = mixed_configs(order, dota_targets)
    configs["my-lora"].init_lora_weights = True
    mixed = get_peft_model(LLAMA.fresh(), configs[order[0]], adapter_name=order[0], mixed=True)
    mixed.add_adapter(order[1], configs[order[1]])
    mixed.set_adapter(list(order))
    assert torch.equal(logits(mixed.eval()), logits(LLAMA.fresh()))


@over_orders
@over_dota_targets
def test_a_disabled_mixed_model_is_the_base(order, dota_targets):
    mixed = mix(mixed_configs(order, dota_targets))
    with mixed.disable_adapter():
        assert torch.equal(logits(mixed), logits(LLAMA.fresh().double()))
    assert_active(mixed, order)


@over_orders
@over_dota_targets
def test_training_a_mixed_model_reaches_both_adapters_only(order, dota_targets):
    mixed = mix(mixed_configs(order, dota_targets)).train()
    mixed(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, parameter in mixed.named_parameters():
        is_adapter = ".lora_" in name or ".dota_update." in name
        assert (parameter.grad is not None) == is_adapter
        assert not is_adapter or parameter.grad.abs().max() > 0


@over_orders
@over_dota_targets
@pytest.mark.parametrize("deleted", ["my-lora", "my-dota"])
def test_deleting_an_adapter_of_a_mixed_model_leaves_the_other(order, dota_targets, deleted):
    mixed = mix(mixed_configs(order, dota_targets))
    (kept,) = {"my-lora", "my-dota"} - {deleted}
    expected = dense_logits(mixed, [kept])
    mixed.delete_adapter(deleted)
    assert not [key for key in mixed.state_dict() if f".{deleted}." in key]
    mixed.set_adapter(kept)
    torch.testing.assert_close(logits(mixed), expected, **DENSE_TOLERANCE)


@over_orders
@over_dota_targets
@pytest.mark.parametrize("merged", [["my-lora"], ["my-dota"], ["my-lora", "my-dota"]], ids="-".join)
def test_merging_and_unloading_a_mixed_model_keeps_its_output(order, dota_targets, merged):
    mixed = mix(mixed_configs(order, dota_targets))
    mixed.set_adapter(merged)
    expected = logits(mixed)
    unloaded = mixed.merge_and_unload()
    assert [name for name, _ in unloaded.named_parameters()] == [name for name, _ in LLAMA.fresh().named_parameters()]
    torch.testing.assert_close(logits(unloaded), expected, **DENSE_TOLERANCE)


@over_orders
@over_dota_targets
@pytest.mark.parametrize("merged", [["my-lora"], ["my-dota"], ["my-lora", "my-dota"]], ids="-".join)
def test_a_mixed_model_computes_the_same_merged_and_unmerged(order, dota_targets, merged):
    mixed = mix(mixed_configs(order, dota_targets))
    expected, base = logits(mixed), logits(LLAMA.fresh().double())
    for _ in range(2):
        mixed.merge_adapter(adapter_names=merged)
        torch.testing.assert_close(logits(mixed), expected, **DENSE_TOLERANCE)
        mixed.unmerge_adapter()
        torch.testing.assert_close(logits(mixed), expected, **DENSE_TOLERANCE)
    mixed.merge_adapter(adapter_names=merged)
    with mixed.disable_adapter():
        torch.testing.assert_close(logits(mixed), base, **DENSE_TOLERANCE)
    torch.testing.assert_close(logits(mixed), expected, **DENSE_TOLERANCE)


@over_orders
def test_a_mixed_model_loads_what_peft_models_saved(order, tmp_path):
    configs = mixed_configs(order, ["v_proj", "up_proj"])
    for name in order:
        adapted = get_peft_model(LLAMA.fresh(), configs[name], adapter_name=name)
        perturb(adapted)
        adapted.save_pretrained(tmp_path)
    folders = {name: str(Path(tmp_path) / name) for name in order}
    mixed = PeftMixedModel.from_pretrained(LLAMA.fresh(), folders[order[0]], order[0])
    mixed.load_adapter(folders[order[1]], order[1])
    mixed.set_adapter(list(order))
    assert_active(mixed.double().eval(), order)
    for name in order:
        alone = PeftModel.from_pretrained(LLAMA.fresh(), folders[name]).double().eval()
        mixed.set_adapter(name)
        torch.testing.assert_close(logits(mixed), logits(alone), **DENSE_TOLERANCE)
