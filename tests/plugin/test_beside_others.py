"""Adapters of ours beside and under others: what one does is neither lost nor undone by the other."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from cases import MODELS, Case, logits, named, over_cases, over_merging_cases, perturb
from tensorpeft import DotaConfig, FactConfig, FloraConfig, LotrConfig
from tensorpeft.plugin.layer import TensorLayer

LLAMA = MODELS[0]
FEW = named("dota", "lotr", "flora")


def linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is nn.Linear and "lm_head" not in name}


@over_cases
def test_a_second_adapter_on_all_linear_layers_is_on_those_that_have_one(case: Case):
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets), "a")
    model.add_adapter("b", case.make(target_modules="all-linear"))
    assert model.peft_config["b"].target_modules == linears(LLAMA.fresh())
    adapted = {layer.name for layer in model.modules() if isinstance(layer, TensorLayer) and "b" in layer.updates}
    assert adapted == linears(LLAMA.fresh())


def test_all_linear_layers_are_not_convolutions():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv1d(4, 4, 3), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(x).mean(-1))

    model = get_peft_model(Net(), FloraConfig(r=2, target_modules=["conv"]), "a")
    model.add_adapter("b", FloraConfig(r=2, target_modules="all-linear"))
    assert model.peft_config["b"].target_modules == {"linear"}


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("over", [LoraConfig, LotrConfig, FactConfig])
def test_merging_under_another_tuner_and_back(case: Case, over: type):
    inner = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets), "a")
    perturb(inner)
    fields = {"init_lora_weights" if over is LoraConfig else "init_weights": False}
    model = get_peft_model(inner.base_model.model, over(target_modules=LLAMA.targets, **fields), "b").eval()
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)


@over_merging_cases
def test_what_is_written_to_a_merged_weight_stays(case: Case):
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets)).eval()
    perturb(model)
    layer = next(layer for layer in model.modules() if isinstance(layer, TensorLayer))
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    model.merge_adapter()
    weight.data += 0.5
    model.unmerge_adapter()
    torch.testing.assert_close(weight.detach(), before + 0.5, rtol=1e-5, atol=1e-5)


def test_a_weight_that_merging_made_no_number_is_put_back():
    model = get_peft_model(LLAMA.fresh(), LotrConfig(r=2, target_modules=LLAMA.targets)).eval()
    before = logits(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_names_of_modules_that_a_prefix_is_a_part_of():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.artifact_encoder = nn.Sequential(nn.Linear(4, 4))

    model = get_peft_model(Net(), LoraConfig(target_modules=["0"]), mixed=True)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert type(model.unload().artifact_encoder[0]) is nn.Linear


@pytest.mark.parametrize("config", [DotaConfig(r=4, target_modules=["q_proj"]), LotrConfig(target_modules=["q_proj"])])
def test_a_checkpoint_whose_names_are_mapped(config: LotrConfig, tmp_path):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = LLAMA.fresh().model

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.backbone(**inputs).last_hidden_state

    model = get_peft_model(LLAMA.fresh(), config).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    ids = torch.arange(7)[None]
    expected = model.base_model.model.model(input_ids=ids).last_hidden_state
    loaded = PeftModel.from_pretrained(Wrapped(), tmp_path, key_mapping={r"^model\.": "backbone."}).eval()
    assert torch.equal(loaded(input_ids=ids), expected)


def test_kept_sums_go_with_what_they_are_of():
    model = get_peft_model(LLAMA.fresh(), DotaConfig(r=4, target_modules=LLAMA.targets)).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, TensorLayer)]
    for change in (lambda: model.to(torch.float64), lambda: model.delete_adapter("default")):
        with torch.no_grad():
            logits(model)
        assert all(layer._cached._entry is not None for layer in layers)
        change()
        assert all(layer._cached._entry is None for layer in layers)


def test_looking_at_an_adapted_layers_weight():
    model = get_peft_model(LLAMA.fresh(), LotrConfig(r=2, target_modules=["q_proj"])).eval()
    plain = LLAMA.fresh().model.layers[0].self_attn.q_proj.weight
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.weight
    assert weight.float().abs().max() == plain.abs().max()
    assert weight.norm() == plain.norm()
    assert not weight.isnan().any()
    with pytest.raises(ValueError, match="reads this layer's weight"):
        torch.ones(1, 24) @ weight.double().float()


def test_names_of_adapters_are_a_list():
    model = get_peft_model(LLAMA.fresh(), LotrConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapter_names='default': expected a list of names"):
        model.merge_adapter(adapter_names="default")


def test_a_range_of_layers_can_be_saved(tmp_path):
    config = LotrConfig(r=2, target_modules=["q_proj"], layers_to_transform=range(1))
    get_peft_model(LLAMA.fresh(), config).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(LLAMA.fresh(), tmp_path).peft_config["default"].layers_to_transform == [0]
