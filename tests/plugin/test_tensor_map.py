"""What is printed before training is what training then has."""

import pytest
import torch
import transformers
from peft import get_peft_model

from cases import MODELS, Case, Model, over_cases, over_models, tiny_llama
from tensorpeft import DotaConfig, LortaConfig, LotrConfig, print_tensor_map
from tensorpeft.plugin.tensor_map import tensor_map


@over_models
@over_cases
def test_the_map_is_what_the_adapter_becomes(model: Model, case: Case):
    config, base = case.make(target_modules=model.targets), model.fresh()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = tensor_map(base, config)
    assert base.state_dict().keys() == before.keys()
    adapted = get_peft_model(base, config)
    layers = [name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "base_layer")]
    assert sorted(name for names in found.tensors.values() for name in names) == sorted(layers)
    assert found.num_parameters == adapted.get_nb_trainable_parameters()[0]


def test_it_fits_a_screen(capsys):
    config = transformers.LlamaConfig(num_hidden_layers=32, vocab_size=64)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    print_tensor_map(model, LortaConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    assert capsys.readouterr().out.splitlines() == [
        "LORTA: 2 tensors, 96 weights, 77,708 trainable parameters",
        "attention: A 4096 · B 128 · C_H 32 · C_L 32 · C_M 2",
        "    model.layers.{0…31}.self_attn.q_proj",
        "    model.layers.{0…31}.self_attn.v_proj",
        "mlp: A 4096 · B 11008 · C_L 32 · C_M 1",
        "    model.layers.{0…31}.mlp.up_proj",
    ]
    print_tensor_map(model, DotaConfig(target_modules="all-linear", layers_to_transform=None))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("DOTA: 224 tensors, 224 weights")
    assert all(len(line) <= 120 for line in lines)


def test_layers_that_are_left_out_are_not_in_it(capsys):
    config = LotrConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0, 1, 3])
    print_tensor_map(tiny_llama(num_hidden_layers=5), config)
    assert "model.layers.{0…1,3}.self_attn.q_proj" in capsys.readouterr().out


def test_default_targets_and_errors_are_those_of_peft():
    found = tensor_map(MODELS[0].fresh(), LotrConfig())  # query and value, the latter with grouped heads
    assert found.tensors.keys() == {"24x24: U 24 · V 24 · G 2", "12x24: U 12 · V 24 · G 2"}
    with pytest.raises(ValueError, match="no layer of the model matches"):
        tensor_map(MODELS[0].fresh(), LotrConfig(target_modules=["nothing"]))
