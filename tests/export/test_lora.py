"""An exported adapter is a LoRA like any other: read by a process that has never heard of us."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from cases import MODELS, logits, perturb, tiny_llama
from tensorpeft import DotaConfig, FactConfig, LortaConfig, LotrConfig
from tensorpeft.export import to_lora
from tensorpeft_cli import main

STORIES = Path(os.environ.get("TENSORPEFT_DATA", "../shared")) / "models" / "stories260K"
LOW_RANK = {
    "lorta": lambda **more: LortaConfig(r=6, **more),
    "lotr": lambda **more: LotrConfig(r=6, **more),
    "fact-tt": lambda **more: FactConfig(r=6, **more),
    "fact-tk": lambda **more: FactConfig(r=6, core="tk", **more),
}
BASES = {
    "grouped-query-llama": (tiny_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    "gpt2": (MODELS[1].build, ["c_attn", "c_fc"]),
}
READER = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for base, adapter in zip(sys.argv[1::2], sys.argv[2::2]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        save_file({"logits": model(input_ids=torch.arange(3, 24).view(3, 7)).logits}, adapter + "/logits.safetensors")
assert not any(name.startswith("tensorpeft") for name in sys.modules)
"""
over_low_rank = pytest.mark.parametrize("method", LOW_RANK)


def saved_base(build, folder: Path) -> Path:
    torch.manual_seed(0)
    build().save_pretrained(folder)
    return folder


def adapted(base: Path, config) -> PeftModel:
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    perturb(model)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """By base and method: the logits of our model, and those that a process of plain PEFT computed from the export."""
    folder = tmp_path_factory.mktemp("exported")
    places = {base: (saved_base(build, folder / base), targets) for base, (build, targets) in BASES.items()}
    if STORIES.is_dir():
        places["stories260K"] = (STORIES, ["q_proj", "v_proj", "o_proj", "up_proj"])
    inputs = torch.arange(3, 24).view(3, 7)
    expected, arguments = {}, []
    for (base, (path, targets)), (method, make) in product(places.items(), LOW_RANK.items()):
        model = adapted(path, make(target_modules=targets, task_type="CAUSAL_LM"))
        layers = to_lora(model, folder / base / method)
        assert all(layer.error == 0 for layer in layers)
        expected[base, method] = logits(model, inputs)
        assert (expected[base, method] - logits(model.unload(), inputs)).abs().max() > 1e-3  # it has an effect
        arguments += [str(path), str(folder / base / method)]
    command = [sys.executable, "-c", READER, *arguments]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return {
        key: (logits, load_file(folder.joinpath(*key) / "logits.safetensors")["logits"])
        for key, logits in expected.items()
    }


@over_low_rank
@pytest.mark.parametrize("base", [*BASES, "stories260K"])
def test_plain_peft_computes_the_same_logits(base: str, method: str, exported):
    if base == "stories260K" and not STORIES.is_dir():
        pytest.skip(f"no model at {STORIES} (TENSORPEFT_DATA)")
    expected, found = exported[base, method]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@over_low_rank
def test_a_saved_adapter_is_exported_without_its_base_s_weights(method: str, tmp_path: Path):
    path = saved_base(tiny_llama, tmp_path / "base")
    model = adapted(path, LOW_RANK[method](target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    to_lora(model, tmp_path / "from-model")
    (path / "model.safetensors").unlink()
    assert main(["export", "lora", str(tmp_path / "adapter"), str(tmp_path / "from-path")]) == 0
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("from-path", "from-model"))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_checkpoint_follows_the_servers_rules(tmp_path: Path):
    """What vLLM's PEFTHelper and LoRAModel, and llama.cpp's convert_lora_to_gguf, ask of a checkpoint."""
    model = adapted(
        saved_base(tiny_llama, tmp_path / "base"), LortaConfig(r=12, target_modules=["q_proj", "down_proj"])
    )
    to_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 16
    assert config["bias"] == "none"
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["layers_to_transform"]
    assert config["target_modules"] == ["down_proj", "q_proj"]  # names without a dot: vLLM compares the last part
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    shapes = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(model\.layers\.\d+\.\w+\.\w+)\.lora_([AB])\.weight", key)
        assert match, key
        shapes[match.groups()] = tensor.shape
    assert len(shapes) == 2 * 4
    for layer, _ in shapes:
        assert shapes[layer, "A"][0] == shapes[layer, "B"][1] == 16
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_layers_that_share_a_name_with_others_are_named_in_full(tmp_path: Path):
    path = saved_base(MODELS[2].build, tmp_path / "base")
    bert = MODELS[2].fresh()
    config = LotrConfig(r=3, target_modules=r".*attention\.output\.dense|.*layer\.1\.intermediate\.dense")
    model = get_peft_model(bert, config).eval()
    model.peft_config["default"].base_model_name_or_path = str(path)
    perturb(model)
    to_lora(model, tmp_path / "lora")
    found = PeftModel.from_pretrained(MODELS[2].fresh(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)
    adapted = {name for name, module in found.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 3


def test_saved_modules_come_along(tmp_path: Path):
    model = MODELS[2]
    peft_model = get_peft_model(
        model.fresh(), LotrConfig(r=3, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    ).eval()
    perturb(peft_model)
    with torch.no_grad():
        peft_model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    with pytest.warns(UserWarning, match="modules_to_save"):
        to_lora(peft_model, tmp_path)
    found = PeftModel.from_pretrained(model.fresh(), tmp_path).eval()
    torch.testing.assert_close(logits(found), logits(peft_model), atol=1e-5, rtol=1e-5)


def dota(base: nn.Module) -> PeftModel:
    model = get_peft_model(base, DotaConfig(r=6, num_cores=3, target_modules=MODELS[0].targets)).eval()
    perturb(model)
    return model


def test_dota_is_cut_to_a_rank_with_the_error_of_every_layer(tmp_path: Path, capsys):
    model = dota(MODELS[0].fresh())
    model.peft_config["default"].base_model_name_or_path = str(saved_base(tiny_llama, tmp_path / "base"))
    errors = {rank: [layer.error for layer in to_lora(model, tmp_path / str(rank), rank=rank)] for rank in (4, 16)}
    assert all(0 < low < high < 1 for high, low in zip(errors[4], errors[16], strict=True))
    # The best approximation of that rank, and the error that is really made.
    layer = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    weight = layer.get_delta_weight("default").double()
    values = torch.linalg.svdvals(weight)
    assert errors[4][0] == pytest.approx((values[4:].norm() / values.norm()).item(), rel=1e-4)
    found = PeftModel.from_pretrained(MODELS[0].fresh(), tmp_path / "4").get_base_model()
    lora = found.get_submodule("model.layers.0.self_attn.q_proj").get_delta_weight("default")
    assert ((lora - weight).norm() / weight.norm()).item() == pytest.approx(errors[4][0], rel=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["export", "lora", str(tmp_path / "adapter"), str(tmp_path / "cli"), "--rank", "4"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in printed
    assert f"{errors[4][0]:.1%}" in printed


def test_errors_say_what_to_do(tmp_path: Path, capsys):
    model = dota(MODELS[0].fresh())
    with pytest.raises(ValueError, match=r"q_proj: its update has a high rank.*Pass the rank"):
        to_lora(model, tmp_path / "out")
    with pytest.raises(ValueError, match="rank 513: expected 1 to 512"):
        to_lora(model, tmp_path / "out", rank=513)
    with pytest.raises(ValueError, match="no layer has an adapter 'other'"):
        to_lora(model, tmp_path / "out", adapter_name="other")
    lorta = get_peft_model(MODELS[0].fresh(), LortaConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="rank=8: this adapter has low rank"):
        to_lora(lorta, tmp_path / "out", rank=8)
    plain = get_peft_model(MODELS[0].fresh(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no layer has an adapter 'default' of tensorpeft"):
        to_lora(plain, tmp_path / "out")
    lorta.save_pretrained(tmp_path / "nameless")
    assert main(["export", "lora", str(tmp_path / "nameless"), str(tmp_path / "out")]) == 2
    assert "names no base model. Load the adapter on its model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
