"""Composite models: every layer reads its own tower's configuration, and each tower has tensors of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from cases import SHARING_CASES, Case, over_cases, perturb, tiny_llama
from tensorpeft import LortaConfig
from tensorpeft.plugin.tensor_map import tensor_map

over_shared = pytest.mark.parametrize("case", SHARING_CASES, ids=lambda case: case.name)
TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"intermediate_size": 44, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}


def clip(hidden_size: int = 24, heads: int = 2) -> nn.Module:
    vision = {**VISION, "hidden_size": hidden_size, "num_attention_heads": heads}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16))


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**VISION, hidden_size=24, num_attention_heads=2)
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 24, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}
    text = {**TEXT, "num_key_value_heads": 2, "rope_parameters": rope}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(vision_config=vision, text_config=text)
    )


def two_berts() -> nn.Module:
    sizes = {**TEXT, "hidden_size": 24}
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**sizes), transformers.BertConfig(**{**sizes, "num_attention_heads": 2})
    )
    return transformers.EncoderDecoderModel(config)


class Pair(nn.Module):
    """A module of one's own around two models."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = tiny_llama().model, tiny_llama(num_attention_heads=2, num_key_value_heads=2).model


# name -> the model, what to adapt, the towers of that with their head dimensions
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, int]]] = {
    "clip": (clip, ["q_proj", "v_proj"], {"text_model": 6, "vision_model": 12}),
    "clip-other-width": (lambda: clip(32, 4), ["q_proj", "v_proj"], {"text_model": 6, "vision_model": 8}),
    "llava": (llava, ["q_proj", "v_proj"], {"model.vision_tower": 12, "model.language_model": 6}),
    "qwen2-vl": (qwen2_vl, ["q_proj", "v_proj"], {"model.language_model": 6}),
    "two-berts": (two_berts, ["query", "value"], {"encoder": 6, "decoder": 12}),
    "a-module-of-two-models": (Pair, ["q_proj", "v_proj"], {"query": 6, "document": 12}),
}
over_models = pytest.mark.parametrize("name", MODELS)


@over_models
@over_shared
def test_no_tensor_spans_two_towers(case: Case, name: str):
    build, targets, towers = MODELS[name]
    found = tensor_map(build(), case.make(target_modules=targets)).tensors
    seen = set()
    for layers in found.values():
        (tower,) = {tower for tower in towers for layer in layers if layer.startswith(f"{tower}.")}
        seen.add(tower)
    assert seen == set(towers)


@over_models
def test_heads_are_the_tower_s(name: str):
    build, targets, towers = MODELS[name]
    model = get_peft_model(build(), LortaConfig(r=2, target_modules=targets))
    factors = {n: p.shape[0] for n, p in model.named_parameters() if n.endswith("_B")}
    if len(towers) == 1:
        assert list(factors.values()) == list(towers.values())
        return
    for tower, head_dim in towers.items():
        (found,) = {dim for key, dim in factors.items() if f"{tower.replace('.', '_')}_attention_B" in key}
        assert found == head_dim


def images_and_texts() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(3, 60, (2, 7), generator=generator),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
    }


def similarities(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**images_and_texts()).logits_per_image


@over_cases
def test_trained_saved_loaded_and_merged(case: Case, tmp_path):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return clip().eval()

    config = case.make(target_modules=["q_proj", "out_proj", "fc1"])
    model = get_peft_model(fresh(), config).eval()
    if case.starts_at_identity:
        assert torch.equal(similarities(model), similarities(fresh()))
    perturb(model)
    expected = similarities(model)
    model(**images_and_texts(), return_loss=True).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(similarities(PeftModel.from_pretrained(fresh(), tmp_path).eval()), expected)
    if case.merges:
        torch.testing.assert_close(similarities(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_a_model_whose_halves_have_one_kind_of_configuration_has_one_tensor():
    config = transformers.T5Config(vocab_size=64, d_model=24, d_kv=6, d_ff=44, num_layers=2, num_heads=4)
    found = tensor_map(transformers.T5Model(config), LortaConfig(target_modules=["q", "v"])).tensors
    assert len(found) == 1


def test_one_tower_alone_keeps_the_names_of_older_adapters():
    model = get_peft_model(llava(), LortaConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)"))
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"attention_A", "attention_B", "attention_C_H", "attention_C_L", "attention_C_M"}
