"""PEFT's mixed models hold adapters of all methods, through one dispatch over a table."""

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from peft.tuners.mixed import model as mixed_model

from cases import CASES, MODELS, logits, perturb
from tensorpeft import DotaConfig, LortaConfig
from tensorpeft.plugin import registration

LLAMA = MODELS[0]


def test_every_method_and_lora_in_one_model():
    mixed = get_peft_model(LLAMA.fresh(), LoraConfig(target_modules=["q_proj"]), "lora", mixed=True)
    assert isinstance(mixed, PeftMixedModel)
    cases = {case.config: case for case in CASES if case.starts_at_identity and case.merges}
    for case in cases.values():
        mixed.add_adapter(case.name, case.make(target_modules=LLAMA.targets))
    mixed.eval()
    for seed, case in enumerate(cases.values()):
        mixed.set_adapter(case.name)
        assert torch.equal(logits(mixed), logits(LLAMA.fresh()))
        perturb(mixed, seed)
        alone = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets), case.name)
        perturb(alone, seed)
        assert {name.rpartition("_update.")[2] for name, _ in trained(mixed)} == {
            name.rpartition("_update.")[2] for name, _ in trained(alone)
        }
        assert not torch.allclose(logits(mixed), logits(LLAMA.fresh()))


@pytest.mark.parametrize("targets", ["all-linear", r"base_model\.model\..*\.q_proj", r".*\.q_proj"])
def test_a_second_adapter_is_targeted_as_peft_targets_lora(targets):
    mixed = get_peft_model(LLAMA.fresh(), LoraConfig(target_modules=["q_proj"]), "lora", mixed=True)
    mixed.add_adapter("theirs", LoraConfig(target_modules=targets))
    mixed.add_adapter("ours", DotaConfig(r=2, target_modules=targets))
    adapted = [
        {name.removesuffix(f".{end}") for name, _ in mixed.named_modules() if name.endswith(end)}
        for end in ("lora_A.theirs", "dota_update.ours")
    ]
    assert {name.replace(".base_layer", "") for name in adapted[0]} == adapted[1] != set()


def trained(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@dataclass
class SettledLortaConfig(LortaConfig):
    """What a user may derive from a method's configuration."""

    r: int = 2


def test_a_derived_configuration_is_of_its_method():
    mixed = get_peft_model(LLAMA.fresh(), LoraConfig(target_modules=["q_proj"]), "lora", mixed=True)
    mixed.add_adapter("ours", SettledLortaConfig(target_modules=["v_proj"]))
    mixed.set_adapter("ours")
    assert {parameter.shape[1] for _, parameter in trained(mixed)} == {2}


def test_the_dispatch_is_replaced_once():
    assert mixed_model.MixedModel._create_and_replace is registration._create_with_our_layers
    assert set(registration._mixed_classes) == {case.config.registered_type for case in CASES}
