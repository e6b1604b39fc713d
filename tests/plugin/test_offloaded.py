"""A base whose layers accelerate has put away, to the CPU or the disk, between their calls."""

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import nn

from cases import (
    CASES,
    MODELS,
    Case,
    logits,
    named,
    over_cases,
    over_identity_cases,
    over_merging_cases,
    perturb,
    tokens,
)

LLAMA = MODELS[0]


def on_cpu() -> nn.Module:
    model = cpu_offload(LLAMA.fresh(), execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    return model


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A function that loads the model with its second block on the disk."""
    folder = tmp_path_factory.mktemp("base")
    LLAMA.fresh().save_pretrained(folder)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")

    def load() -> nn.Module:
        model = type(LLAMA.fresh()).from_pretrained(
            folder, device_map={**places, "model.layers.1": "disk"}, offload_folder=folder / "offload"
        )
        assert model.model.layers[1].self_attn.q_proj.weight.is_meta
        return model.eval()

    return load


def adapt(base: nn.Module, case: Case) -> PeftModel:
    torch.manual_seed(3)
    model = get_peft_model(base, case.make(target_modules=LLAMA.targets))
    perturb(model)
    return model


def assert_close(model: nn.Module, plain: nn.Module) -> None:
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case", named("dota", "dota-random", "superlora", "lora-pt", "tcur-lora"), ids=lambda c: c.name
)
def test_a_token_is_decoded_as_with_a_base_that_is_there(case: Case):
    model, plain = adapt(on_cpu(), case).eval(), adapt(LLAMA.fresh(), case).eval()
    token = tokens(batch=1, length=1)
    torch.testing.assert_close(logits(model, token), logits(plain, token), rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@over_identity_cases
def test_a_new_adapter_changes_nothing(case: Case):
    model = get_peft_model(on_cpu(), case.make(target_modules=LLAMA.targets))
    assert torch.equal(logits(model), logits(LLAMA.fresh()))


@over_cases
def test_a_new_adapter_is_that_of_a_base_that_is_there(case: Case):
    model, plain = adapt(on_cpu(), case).train(), adapt(LLAMA.fresh(), case).train()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-3, atol=1e-5)
    assert_close(model.eval(), plain.eval())


@over_cases
def test_an_adapter_is_loaded(case: Case, on_disk, tmp_path):
    plain = adapt(LLAMA.fresh(), case).eval()
    plain.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(on_disk(), tmp_path)
    assert_close(model, plain)
    perturb(model)
    model.load_adapter(tmp_path, "default")
    assert_close(model, plain)
    assert model.hf_device_map["model.layers.1"] == "disk"
    assert_close(PeftModel.from_pretrained(on_disk(), tmp_path, low_cpu_mem_usage=True), plain)
    theirs = on_disk()
    theirs.load_adapter(tmp_path)
    assert_close(theirs, plain)


def test_an_adapter_of_another_base_is_refused(on_disk, tmp_path):
    other = LLAMA.fresh()
    for parameter in other.model.layers[1].parameters():
        parameter.data = torch.randn_like(parameter)
    adapt(other, CASES[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1.*started from another base model"):
        PeftModel.from_pretrained(on_disk(), tmp_path)


@over_merging_cases
def test_merging(case: Case, on_disk):
    plain, model = adapt(LLAMA.fresh(), case).eval(), adapt(on_disk(), case).eval()
    before = logits(model)
    model.merge_adapter(safe_merge=True)
    assert_close(model, plain)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert_close(model.merge_and_unload(), plain)


@over_cases
def test_a_weight_that_another_module_s_hook_fetches_is_refused(case: Case):
    model = cpu_offload(
        LLAMA.fresh(), execution_device=torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"]
    )
    with pytest.raises(ValueError, match="preload_module_classes"):
        get_peft_model(model, case.make(target_modules=LLAMA.targets))
