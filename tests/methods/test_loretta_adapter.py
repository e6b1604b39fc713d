"""LoRETTA's adapter form: its dense formula behind the layers of whole models, and what a non-linear map refuses."""

import copy
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, convert_to_lora, get_peft_model
from torch import nn

from bottleneck_oracle import addition, behind, bonds, matrices
from cases import MODELS, Model, logits, over_models, tokens
from own_factor_oracles import trained, trained_cores
from tensorpeft import DotaConfig, LorettaAdapterConfig, LorettaConfig
from tensorpeft.export import to_dense, to_lora

TOLERANCE = 1e-10
LLAMA = MODELS[0]
SMALL = {"bottleneck": 12, "tt_rank": 2, "modes": {6: [2, 3], 12: [3, 4], 24: [2, 4, 3], 44: [4, 11]}}
DEFAULT_TARGETS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2-conv1d": ["attn.c_proj", "mlp.c_proj"],
    "bert": ["attention.output.dense", "output.dense"],
}
BLOCKS = {"llama": "model.layers.", "gpt2-conv1d": "transformer.h.", "bert": "bert.encoder.layer."}
over_targets = pytest.mark.parametrize("targets", ["default", "own"])


def targets_of(model: Model, targets: str) -> list[str] | None:
    return None if targets == "default" else model.targets


def config(**more: Any) -> LorettaAdapterConfig:
    return LorettaAdapterConfig(**{**SMALL, "init_weights": False, **more})


def adapted(model: Model, dtype: torch.dtype = torch.float64, **more: Any) -> PeftModel:
    peft_model = get_peft_model(model.fresh().to(dtype), config(**more)).eval()
    fill(peft_model)
    return peft_model.double() if dtype == torch.float64 else peft_model


def fill(model: nn.Module, seed: int = 2) -> None:
    """What is trained, far from its start; the biases as small as the models' numbers, or they alone would decide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "_update." in name:
                scale = 0.02 if name.endswith("_bias") else 0.7
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def tensors_of(model: PeftModel) -> dict[str, dict[str, torch.Tensor]]:
    layers = trained(model)
    return {name: {key: tensor.detach().clone() for key, tensor in layers[name].items()} for name in layers}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is not of an adapter, by the names in the base model."""
    found = {}
    for name, tensor in model.state_dict().items():
        if "_update." not in name and ".lora_" not in name:
            found[name.removeprefix("base_model.model.").replace("base_layer.", "")] = tensor.clone()
    return found


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@over_models
def test_default_targets_are_the_last_layers_of_the_blocks(model: Model):
    layers = [f"{BLOCKS[model.name]}{k}.{name}" for k in range(2) for name in DEFAULT_TARGETS[model.name]]
    peft_model = adapted(model)
    assert list(tensors_of(peft_model)) == layers
    assert type(peft_model.peft_config["default"].target_modules) is set


def names_of_adapted(model: nn.Module) -> list[str]:
    """The layers in the base model that have an adapter of ours, whatever else they have."""
    names = {name.split(".base_layer")[0] for name, module in model.named_modules() if "behind" in held(module)}
    return sorted(name.removeprefix("base_model.model.") for name in names)


def held(module: nn.Module) -> list[str]:
    """The adapters of ours at a layer."""
    return list(getattr(module, "lorettaadapter_update", ()))


@pytest.mark.parametrize("order", ["adapter-first", "adapter-last"])
@over_models
def test_default_targets_are_the_same_in_a_mixed_model(model: Model, order: str):
    alone = get_peft_model(model.fresh(), config(), adapter_name="behind")
    configs = {"behind": config(), "other": LoraConfig(target_modules=model.targets)}
    names = sorted(configs, reverse=order == "adapter-last")
    mixed = get_peft_model(model.fresh(), configs[names[0]], adapter_name=names[0], mixed=True)
    mixed.add_adapter(names[1], configs[names[1]])
    assert names_of_adapted(mixed) == names_of_adapted(alone)


@pytest.mark.parametrize("model_type", LorettaAdapterConfig.default_targets)
@pytest.mark.filterwarnings("ignore:the size .* is prime")
def test_default_targets_are_in_attention_and_mlp_of_every_architecture_that_has_some(model_type: str):
    settings = transformers.AutoConfig.for_model(model_type)
    if model_type == "esm":
        settings.vocab_size = 33
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if hasattr(settings, name):
            setattr(settings, name, 1)
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(settings)
    get_peft_model(base, LorettaAdapterConfig(), adapter_name="behind", low_cpu_mem_usage=True)
    names = names_of_adapted(base)
    assert {"att" in name.lower() for name in names} == {True, False}, names
    assert {base.get_submodule(name).out_features for name in names} == {settings.hidden_size}


def test_an_architecture_without_default_targets_asks_for_them():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), LorettaAdapterConfig())


@over_targets
@over_models
@pytest.mark.parametrize("arguments", [SMALL, {"bottleneck": 64, "tt_rank": 5, "modes": None}], ids=["small", "papers"])
def test_outputs_and_gradients_are_those_of_the_dense_formula(model: Model, targets: str, arguments: dict[str, Any]):
    peft_model = adapted(model, target_modules=targets_of(model, targets), **arguments)
    base, layers = model.fresh().double(), trained(peft_model)
    assert len(layers) == 2 * len(DEFAULT_TARGETS[model.name] if targets == "default" else model.targets)
    copies = tensors_of(peft_model)
    before = logits(base)
    for tensor in (tensor for tensors in copies.values() for tensor in tensors.values()):
        tensor.requires_grad_()
    with behind(base, copies):
        expected = base(input_ids=tokens()).logits
    assert (expected - before).abs().max() > 1e-4  # nothing is proved by zeros
    output = peft_model(input_ids=tokens()).logits
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits(peft_model), expected.detach(), rtol=0, atol=TOLERANCE)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, tensors in layers.items():
        for key, tensor in tensors.items():
            wanted = copies[name][key].grad
            assert (tensor.grad - wanted).abs().max() < TOLERANCE * wanted.abs().max(), (name, key)  # not of zeros


def test_the_dense_formula_bends():
    """Or a linear map would pass: about half of the hidden numbers are cut off."""
    peft_model, z = adapted(LLAMA), torch.randn(50, 24, generator=torch.Generator().manual_seed(4)).double()
    for tensors in tensors_of(peft_model).values():
        down, _ = matrices(tensors)
        assert 0.2 < (z @ down.T + tensors["down_bias"] > 0).double().mean() < 0.8
        odd = addition(z, tensors) + addition(-z, tensors) - 2 * addition(torch.zeros_like(z), tensors)
        assert odd.abs().max() > 1e-2
        layer = peft_model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(5, 44, generator=torch.Generator().manual_seed(4)).double()  # and the gradient of what goes in
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(x).square().sum().backward()
    z = layer.get_base_layer()(y)
    (z + addition(z, tensors)).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=TOLERANCE, atol=0)


def test_a_block_of_bert_base_has_the_paper_s_number_of_parameters():
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Linear(3072, 768)})
    update = get_peft_model(model, LorettaAdapterConfig(target_modules=["layer"])).base_model.model.layer.updates
    tensors = dict(update["default"].named_parameters())
    biases = [tensors.pop(name) for name in ("down_bias", "up_bias")]
    modes = [8, 12, 8, 8, 8]  # of 768, then of 64
    inner = bonds(modes, 5)
    assert inner == [1, 5, 5, 5, 5, 1]
    shapes = [(left, mode, right) for left, mode, right in zip(inner, modes, inner[1:])]
    turned = [8, 8, 8, 12, 8]
    assert [tuple(tensors[f"down_{k}"].shape) for k in range(1, 6)] == shapes
    assert [tensors[f"up_{k}"].shape[1] for k in range(1, 6)] == turned
    assert len(tensors) == 10
    trains = 2 * (5 * 8 + 25 * 12 + 25 * 8 + 25 * 8 + 5 * 8)
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(map(prod, shapes)) * 2 == trains == 1560
    assert sum(bias.numel() for bias in biases) == 64 + 768 == 832
    assert sum(p.numel() for p in update["default"].parameters()) == 2392


@over_models
@pytest.mark.parametrize(("bottleneck", "tt_rank"), [(1, 3), (6, 1), (8, 100), (30, 4)])
@pytest.mark.filterwarnings("ignore:the size .* is prime")
def test_the_bonds_are_never_larger_than_they_need_be(model: Model, bottleneck: int, tt_rank: int):
    peft_model = adapted(
        model, target_modules=model.targets, bottleneck=bottleneck, tt_rank=tt_rank, modes={24: [2, 3, 4]}
    )
    base = model.fresh().double()
    for name, tensors in trained(peft_model).items():
        size = len(tensors["up_bias"])
        layer = peft_model.base_model.model.get_submodule(name)
        update = copy.deepcopy(layer.updates["default"])
        del update.down_bias, update.up_bias
        for side, order in (("down", (size, bottleneck)), ("up", (bottleneck, size))):
            shapes = trained_cores(update)[side]
            modes = [shape[1] for shape in shapes]
            assert prod(modes) == prod(order)
            if size == 24:
                assert (modes[:3] if side == "down" else modes[-3:]) == [2, 3, 4]
            chain = bonds(modes, tt_rank)
            assert shapes == list(zip(chain, modes, chain[1:]))
    with behind(base, tensors_of(peft_model)):
        torch.testing.assert_close(logits(peft_model), logits(base), rtol=0, atol=TOLERANCE)


def test_the_modes_survive_a_checkpoint(tmp_path):
    peft_model = adapted(LLAMA, torch.float32, bottleneck=6, modes={24: [12, 2], 6: [3, 2]})
    tensors = trained(peft_model)["model.layers.1.mlp.down_proj"]
    assert [tuple(tensors[f"down_{k}"].shape) for k in range(1, 5)] == [(1, 12, 2), (2, 2, 2), (2, 3, 2), (2, 2, 1)]
    assert [tuple(tensors[f"up_{k}"].shape) for k in range(1, 5)] == [(1, 3, 2), (2, 2, 2), (2, 12, 2), (2, 2, 1)]
    peft_model.save_pretrained(tmp_path)  # JSON's keys are strings
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path).eval()), logits(peft_model))


@over_targets
@over_models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_base(model: Model, targets: str, dtype: torch.dtype):
    base = model.fresh().to(dtype)
    more = {"target_modules": targets_of(model, targets), "init_weights": True}
    peft_model = get_peft_model(copy.deepcopy(base), config(**more)).eval()
    expected = logits(base)
    assert torch.equal(logits(peft_model), expected)
    peft_model(input_ids=tokens()).logits.square().sum().backward()
    assert torch.equal(peft_model(input_ids=tokens()).logits, expected)
    for tensors in trained(peft_model).values():
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        last = max((key for key in tensors if key.startswith("up_") and key != "up_bias"), key=lambda key: int(key[3:]))
        assert not tensors[last].any()
        assert not tensors["down_bias"].any()
        assert not tensors["up_bias"].any()
        assert tensors[last].grad.abs().max() > 0
        assert tensors["up_bias"].grad.abs().max() > 0
        assert all(tensor.any() for key, tensor in tensors.items() if key not in ("down_bias", "up_bias", last))


@over_models
def test_start_is_exact_under_autocast_and_what_is_trained_stays_near_the_formula(model: Model):
    peft_model = get_peft_model(model.fresh(), config(init_weights=True)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model.fresh())
        assert torch.equal(logits(peft_model), expected)
        outputs = []
        for in_training in (peft_model.train(), model.fresh().train()):
            torch.manual_seed(0)  # of the model's dropout
            outputs.append(in_training(input_ids=tokens()).logits)
    assert torch.equal(*outputs)
    peft_model = adapted(model, torch.float32)
    exact = logits(copy.deepcopy(peft_model).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = peft_model(input_ids=tokens()).logits
        found.square().sum().backward()
    assert (found - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad.isfinite().all() for tensors in trained(peft_model).values() for p in tensors.values())


@over_models
def test_half_precision_follows_the_formula(model: Model):
    peft_model = adapted(model, torch.bfloat16)
    exact = logits(copy.deepcopy(peft_model).double())
    for found in (logits(peft_model), logits(copy.deepcopy(peft_model).to(torch.bfloat16))):
        assert found.dtype == torch.bfloat16
        assert (found - exact).norm() < 0.03 * exact.norm()


@over_targets
@over_models
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reloaded_it_is_the_saved_one(model: Model, targets: str, low_cpu_mem_usage: bool, tmp_path):
    peft_model = adapted(model, torch.float32, target_modules=targets_of(model, targets))
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert not torch.allclose(logits(loaded), logits(model.fresh()))
    assert torch.equal(logits(loaded), logits(peft_model))


@over_models
def test_disabled_and_unloaded_it_is_the_base(model: Model):
    peft_model, expected = adapted(model, torch.float32), logits(model.fresh())
    before = logits(peft_model)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)
    assert torch.equal(logits(peft_model), before)
    unloaded = peft_model.unload()
    assert repr(unloaded) == repr(model.fresh())
    assert torch.equal(logits(unloaded), expected)
    assert_same(base_weights(unloaded), model.fresh().state_dict())


@over_models
def test_several_active_adapters_read_the_same_output_and_add_up(model: Model):
    peft_model, base = adapted(model, target_modules=model.targets), model.fresh().double()
    peft_model.add_adapter("second", config(bottleneck=6, target_modules=model.targets))
    tensors = []
    for seed, name in enumerate(("default", "second")):
        peft_model.set_adapter(name)
        fill(peft_model, seed)
        peft_model.double()
        active = [key for key, parameter in peft_model.named_parameters() if parameter.requires_grad]
        assert all(f".{name}." in key for key in active)
        tensors.append(tensors_of(peft_model))
    peft_model.base_model.set_adapter(["default", "second"])
    with behind(base, *tensors):
        expected = logits(base)
    torch.testing.assert_close(logits(peft_model.eval()), expected, rtol=0, atol=TOLERANCE)
    with behind(base, tensors[0]):
        assert not torch.allclose(logits(base), expected)


@over_targets
@over_models
def test_rows_of_many_adapters_in_one_batch(model: Model, targets: str):
    peft_model = adapted(model, target_modules=targets_of(model, targets))
    for seed, (name, bottleneck) in enumerate({"v": 12, "w": 12, "y": 6}.items()):
        peft_model.add_adapter(name, config(bottleneck=bottleneck, target_modules=targets_of(model, targets)))
        peft_model.set_adapter(name)
        fill(peft_model, seed)
    peft_model.double().eval()
    rows, inputs = ["w", "__base__", "default", "y", "v", "w"], tokens(batch=6)
    mixed, alone = logits(peft_model, inputs, adapter_names=rows), {"__base__": logits(model.fresh().double(), inputs)}
    for name in ("default", "v", "w", "y"):
        peft_model.set_adapter(name)
        alone[name] = logits(peft_model, inputs)
    assert not torch.allclose(alone["v"], alone["w"])
    expected = [alone[name][k] for k, name in enumerate(rows)]
    torch.testing.assert_close(mixed, torch.stack(expected), atol=TOLERANCE, rtol=0)


REFUSED = {
    "merge_adapter": lambda model, _: model.merge_adapter(),
    "merge_adapter_safely": lambda model, _: model.merge_adapter(safe_merge=True),
    "merge_and_unload": lambda model, _: model.merge_and_unload(),
    "merge_and_unload_safely": lambda model, _: model.merge_and_unload(safe_merge=True),
    "merge_by_name": lambda model, _: model.merge_and_unload(adapter_names=["default"]),
    "get_delta_weight": lambda model, _: next(layers_of(model)).get_delta_weight("default"),
    "to_lora": lambda model, path: to_lora(model, path / "lora"),
    "to_lora_of_rank": lambda model, path: to_lora(model, path / "lora", rank=4),
}


def layers_of(model: nn.Module):
    return (module for module in model.modules() if hasattr(module, "get_delta_weight"))


@over_models
@pytest.mark.parametrize("refused", REFUSED)
def test_a_non_linear_map_is_neither_merged_nor_exported(model: Model, refused: str, tmp_path):
    peft_model = adapted(model, torch.float32)
    peft_model.peft_config["default"].base_model_name_or_path = "a/name"
    before, base = logits(peft_model), model.fresh().state_dict()
    message = r"(?i)non-linear.*(merge|export)"
    with pytest.raises(ValueError, match=message):
        REFUSED[refused](peft_model, tmp_path)
    assert_same(base_weights(peft_model), base)
    layers = list(layers_of(peft_model))
    assert len(layers) == 4
    assert not any(layer.merged_adapters or layer.merged for layer in layers)
    assert torch.equal(logits(peft_model), before)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), logits(model.fresh()))
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("safe_merge", [False, True])
def test_refused_with_the_normalisation_layers_trained_too_it_is_as_it_was(safe_merge: bool):
    """As in the paper. Those of the embeddings come before every adapter."""
    model = MODELS[2]
    peft_model = adapted(model, torch.float32, modules_to_save=["LayerNorm"])
    for name, parameter in peft_model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(0.1)
    before, modules = logits(peft_model), [(name, type(module)) for name, module in peft_model.named_modules()]
    assert any("embeddings.LayerNorm.modules_to_save" in name for name, _ in modules)
    for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises(ValueError, match=r"(?i)non-linear.*merge"):
            merge(safe_merge=safe_merge)
        assert [(name, type(module)) for name, module in peft_model.named_modules()] == modules
        assert torch.equal(logits(peft_model), before)


@over_models
def test_peft_does_not_convert_it_either(model: Model):
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(model, torch.float32), rank=4)


def test_a_saved_one_is_not_exported(tmp_path):
    base = LLAMA.fresh()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    get_peft_model(base, config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    for export in (to_lora, to_dense):
        with pytest.raises(ValueError, match=r"(?i)non-linear.*(merge|export)"):
            export(tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()


OTHERS: dict[str, Any] = {
    "lora": lambda **more: LoraConfig(r=3, **more),
    "loretta": lambda **more: LorettaConfig(r=3, tt_rank=2, **more),
}


over_orders = pytest.mark.parametrize("order", ["adapter-first", "adapter-last"])
over_others = pytest.mark.parametrize("other", OTHERS)


def mixed_model(model: Model, other: str, order: str, targets: list[str]) -> PeftMixedModel:
    """Both active and trained, the adapter on its usual layers."""
    configs = {
        "behind": config(target_modules=DEFAULT_TARGETS[model.name]),
        "other": OTHERS[other](target_modules=targets),
    }
    names = sorted(configs, reverse=order == "adapter-last")
    mixed = get_peft_model(model.fresh(), configs[names[0]], adapter_name=names[0], mixed=True)
    mixed.add_adapter(names[1], configs[names[1]])
    mixed.set_adapter(names)
    fill(mixed.eval())
    for name, parameter in mixed.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return mixed


@pytest.mark.filterwarnings("ignore:the size .* is prime")
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe_merge", [False, True])
@over_orders
@over_others
def test_what_could_be_merged_is_not_merged_beside_it(other: str, order: str, safe_merge: bool, merge: str):
    """On layers that come before it in the model, too: half a merge would be worse than none."""
    mixed = mixed_model(LLAMA, other, order, [*LLAMA.targets, *DEFAULT_TARGETS["llama"]])
    before = logits(mixed)
    with pytest.raises(ValueError, match=r"(?i)non-linear.*merge"):
        getattr(mixed, merge)(safe_merge=safe_merge)
    assert_same(base_weights(mixed), LLAMA.fresh().state_dict())
    assert not any(getattr(module, "merged_adapters", ()) for module in mixed.modules())
    assert torch.equal(logits(mixed), before)


@pytest.mark.filterwarnings("ignore:the size .* is prime")
@over_orders
@over_others
def test_merging_another_method_alone_keeps_the_output_or_is_refused(other: str, order: str):
    mixed = mixed_model(LLAMA, other, order, DEFAULT_TARGETS["llama"])
    before = logits(mixed)
    with suppress(ValueError):
        mixed.merge_adapter(adapter_names=["other"])
    torch.testing.assert_close(logits(mixed), before, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the size .* is prime")
@over_orders
@over_others
@over_models
def test_beside_another_method_in_one_mixed_model(model: Model, other: str, order: str):
    """On the very layers that the other method adapts, and on those that it does not."""
    targets = [*model.targets, *DEFAULT_TARGETS[model.name]]
    behind = config(init_weights=True, target_modules=DEFAULT_TARGETS[model.name])
    configs = {"behind": behind, "other": OTHERS[other](target_modules=targets)}
    names = sorted(configs, reverse=order == "adapter-last")
    mixed = get_peft_model(model.fresh(), configs[names[0]], adapter_name=names[0], mixed=True)
    assert isinstance(mixed, PeftMixedModel)
    mixed.add_adapter(names[1], configs[names[1]])
    mixed.set_adapter(names)
    expected = logits(model.fresh())
    assert torch.equal(logits(mixed.eval()), expected)
    for name, parameter in mixed.named_parameters():
        if ".behind." in name or ".other." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    outputs = {"both": logits(mixed)}
    for name in names:
        mixed.set_adapter([name])
        outputs[name] = logits(mixed)
    assert not torch.allclose(outputs["both"], outputs["behind"])
    assert not torch.allclose(outputs["both"], outputs["other"])
    mixed.set_adapter(names)
    assert torch.equal(logits(mixed), outputs["both"])
    with mixed.disable_adapter():
        assert torch.equal(logits(mixed), expected)
    assert torch.equal(logits(mixed), outputs["both"])


@pytest.mark.filterwarnings("ignore:the size .* is prime")
def test_of_several_updates_at_a_layer_the_adapter_reads_the_sum():
    """The output that stands in the formula has the updates of the weight in it."""
    update = LorettaConfig(r=3, tt_rank=2, target_modules=["down_proj"], init_weights=False)
    mixed = get_peft_model(LLAMA.fresh(), update, adapter_name="weights", mixed=True)
    mixed.add_adapter("behind", config(target_modules=["down_proj"]))
    mixed.set_adapter(["weights", "behind"])
    mixed.double().eval()
    layer = mixed.base_model.model.model.layers[0].mlp.down_proj
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, parameter in layer.named_parameters():
        if ".behind." in name:
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            tensors[name.rpartition(".")[2]] = parameter
    found = next(module for module in layer.modules() if "weights" in getattr(module, "updates", {}))
    x = torch.randn(5, 44, generator=generator, dtype=torch.float64)
    z = x @ (LLAMA.fresh().double().model.layers[0].mlp.down_proj.weight + found.get_delta_weight("weights")).T
    torch.testing.assert_close(layer(x), z + addition(z, tensors), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bottleneck", 0),
        ("bottleneck", -4),
        ("bottleneck", 2.5),
        ("tt_rank", 0),
        ("tt_rank", 1.5),
        ("modes", {24: [5, 5]}),
        ("modes", {24: [24]}),
        ("modes", {24: [-4, -6]}),
        ("modes", {24: [4.0, 6.0]}),
        ("modes", [4, 6]),
        ("init_weights", "svd"),
    ],
)
def test_impossible_configuration(field: str, value: Any):
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        LorettaAdapterConfig(**{field: value})


def test_training_lowers_the_loss_and_moves_every_tensor():
    peft_model = get_peft_model(LLAMA.fresh(), config(init_weights=True)).train()
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    start, losses = tensors_of(peft_model), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = peft_model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, tensors in tensors_of(peft_model).items():
        assert all((tensor - start[name][key]).abs().max() > 1e-4 for key, tensor in tensors.items()), name
    assert_same(base_weights(peft_model), LLAMA.fresh().state_dict())


class Quantized(nn.Module):
    """A linear layer in 4 bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        source = nn.Linear(128, 64)
        layer = pytest.importorskip("bitsandbytes").nn.Linear4bit
        self.linear = layer(128, 64, quant_type="nf4", compute_dtype=torch.float32)
        self.linear.load_state_dict(source.state_dict())
        self.linear.to("cpu")  # quantises

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_on_a_residual_base():
    pytest.importorskip("bitsandbytes")
    from tensorpeft.quantization import quantize_residual

    def base() -> nn.Module:
        return quantize_residual(LLAMA.fresh(), DotaConfig(r=6, num_cores=3, target_modules=LLAMA.targets)).eval()

    peft_model, expected = get_peft_model(base(), config(init_weights=True)).eval(), logits(base())
    assert torch.equal(logits(peft_model), expected)
    fill(peft_model)
    before = logits(peft_model)
    with behind(base(), tensors_of(peft_model)) as hooked:
        torch.testing.assert_close(before, logits(hooked), atol=1e-5, rtol=1e-5)
    for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises(ValueError, match=r"(?i)non-linear.*merge"):
            merge()
        assert torch.equal(logits(peft_model), before)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)


def test_it_compiles_as_one_graph():
    peft_model = adapted(LLAMA, torch.float32)
    compiled = torch.compile(peft_model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=tokens()).logits, peft_model(input_ids=tokens()).logits)


def test_on_a_base_in_4_bits():
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    expected = Quantized().eval()(x)
    settings: PeftConfig = LorettaAdapterConfig(target_modules=["linear"], bottleneck=16)
    model = get_peft_model(Quantized().eval(), settings).eval()
    assert torch.equal(model(x), expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model.train()(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < losses[1]
    before = model.eval()(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"(?i)non-linear.*merge"):
            merge()
        assert torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    layer = next(layers_of(model))
    torch.testing.assert_close(before, expected + addition(expected, trained(model)["linear"]), atol=1e-5, rtol=1e-5)
    assert not layer.merged_adapters
