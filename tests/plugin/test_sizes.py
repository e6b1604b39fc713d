"""Parameter counts on the real architectures, without their weights, and the size of a checkpoint."""

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from cases import CASES, MODELS, logits, over_cases, over_models, tokens
from tensorpeft import DotaConfig, FactConfig, LortaConfig, LotrConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
CASES_WITHOUT_NUMBERS = [case for case in CASES if case.arguments.get("r") != "auto"]  # that one looks into the weights
ARCHITECTURES = {
    "LLaMA-2-7B": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "LLaMA-3-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


@pytest.mark.parametrize(
    ("architecture", "r", "expected"),
    [
        ("LLaMA-2-7B", 8, 2_531_328),
        ("LLaMA-2-7B", 16, 10_043_392),
        ("LLaMA-2-7B", 32, 34_422_784),
        ("LLaMA-3-8B", 8, 1_325_056),
        ("LLaMA-3-8B", 16, 5_206_016),
        ("LLaMA-3-8B", 32, 16_106_496),
    ],
)
def test_dota_has_the_paper_s_number_of_parameters(architecture: str, r: int, expected: int):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURES[architecture]))
    peft_model = get_peft_model(model, DotaConfig(r=r, target_modules=TARGETS))
    trainable, _ = peft_model.get_nb_trainable_parameters()
    assert trainable == expected


@over_models
@over_cases
def test_trainable_parameters_are_the_update_s_only(model, case):
    peft_model = get_peft_model(model.fresh(), case.make(target_modules=model.targets))
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("_update.default." in name for name in trained)


@over_models
@pytest.mark.parametrize("case", CASES_WITHOUT_NUMBERS, ids=lambda case: case.name)
def test_an_adapted_model_runs_on_the_meta_device(model, case):
    with torch.device("meta"):  # what the adapter draws, too
        config = case.make(target_modules=model.targets)
        peft_model = get_peft_model(model.fresh().to("meta"), config, low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in peft_model.parameters())
    output = peft_model(input_ids=tokens().to("meta")).logits
    assert output.is_meta
    assert output.shape == logits(model.fresh()).shape


def test_a_checkpoint_is_its_trained_and_start_cores(tmp_path):
    """On a model large enough for the header not to matter: (trained + start) x 4 bytes + 5 %."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    peft_model = get_peft_model(LlamaForCausalLM(config), DotaConfig(r=16, target_modules=TARGETS))
    trained, _ = peft_model.get_nb_trainable_parameters()
    start = sum(buffer.numel() for name, buffer in peft_model.named_buffers() if "start_" in name)
    assert start == trained
    peft_model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert 1 <= (tmp_path / "adapter_model.safetensors").stat().st_size / (4 * (trained + start)) <= 1.05


@pytest.mark.parametrize("config", [LortaConfig(r=16), LotrConfig(r=16), FactConfig(r=16), FactConfig(r=16, core="tk")])
def test_a_checkpoint_has_shared_factors_once(config: PeftConfig, tmp_path):
    """Parameters x 4 bytes + 5 %, however many layers use them."""
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4, vocab_size=64)
    )
    config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj"}
    peft_model = get_peft_model(model, config)
    trained, _ = peft_model.get_nb_trainable_parameters()
    peft_model.save_pretrained(tmp_path)
    assert 1 <= (tmp_path / "adapter_model.safetensors").stat().st_size / (4 * trained) <= 1.05


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"q_proj", "v_proj"}),  # PEFT's LoRA mapping
        ({"target_modules": "all-linear"}, {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}, {"q_proj"}),
        ({"target_modules": r".*mlp\.(up|down)_proj"}, {"up_proj", "down_proj"}),
    ],
)
def test_targets_are_found_as_in_peft(arguments: dict, expected: set[str]):
    peft_model = get_peft_model(MODELS[0].fresh(), DotaConfig(num_cores=2, **arguments))
    assert {name.rpartition(".")[2] for name in peft_model.targeted_module_names} == expected


def test_layers_and_ranks_are_chosen_as_in_peft():
    config = DotaConfig(
        r=4,
        num_cores=3,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        rank_pattern={"v_proj": 2},
        modes={24: [2, 3, 4]},
    )
    peft_model = get_peft_model(MODELS[0].fresh(), config)
    assert peft_model.targeted_module_names == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    attention = peft_model.base_model.model.model.layers[1].self_attn
    assert [tuple(core.shape) for core in attention.q_proj.updates["default"].cores()] == [
        (1, 2, 2, 4),
        (4, 3, 3, 4),
        (4, 4, 4, 1),
    ]
    assert max(core.shape[3] for core in attention.v_proj.updates["default"].cores()) == 2
