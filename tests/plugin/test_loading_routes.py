"""An adapter is loaded exactly by whichever way: into injected layers, as a full state, in inference mode."""

import copy
from functools import partial

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from cases import (
    CASES,
    MODELS,
    Case,
    Model,
    logits,
    over_cases,
    over_merging_cases,
    over_models,
    perturb,
    tiny_llama,
    tokens,
)

LLAMA = MODELS[0]


def trained(case: Case, model: Model = LLAMA) -> PeftModel:
    peft_model = get_peft_model(model.fresh(), case.make(target_modules=model.targets)).eval()
    perturb(peft_model)
    return peft_model


def fresh(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return tiny_llama().eval()


@over_cases
def test_injected_into_the_layers_that_a_state_dict_names(case: Case):
    source = inject_adapter_in_model(case.make(target_modules=LLAMA.targets), LLAMA.fresh())
    perturb(source)
    saved = get_peft_model_state_dict(source)
    # Where tensors are layers' own, the keys count: the configuration names fewer layers.
    is_shared = all(key.startswith("shared_") for key in saved)
    config = case.make(target_modules=LLAMA.targets if is_shared else LLAMA.targets[:1])
    model = inject_adapter_in_model(config, LLAMA.fresh(), state_dict=saved)
    set_peft_model_state_dict(model, saved)
    assert torch.equal(logits(model), logits(source.eval()))


@over_cases
@pytest.mark.parametrize("assign", [False, True])
def test_full_state_over_a_fresh_base(case: Case, assign: bool):
    trained_model = get_peft_model(fresh(1), case.make(target_modules=LLAMA.targets)).eval()
    perturb(trained_model)
    restored = get_peft_model(fresh(2), case.make(**_settled(trained_model))).eval()
    restored.load_state_dict(copy.deepcopy(trained_model.state_dict()), assign=assign)
    assert torch.equal(logits(restored), logits(trained_model))


def _settled(model: PeftModel) -> dict:
    """What the shapes took from the weights, which a fresh base does not tell."""
    config = model.peft_config["default"]
    return {"target_modules": LLAMA.targets, **({"bonds": config.bonds} if getattr(config, "bonds", None) else {})}


@over_models
def test_full_state_whose_adapter_is_of_another_base(model: Model):
    case = CASES[0]  # whose start is a part of the weight
    restored, state = trained(case, model), trained(case, model).state_dict()
    for key in list(state):
        if key.endswith("base_layer.weight"):
            state[key] = torch.randn_like(state[key])
    before = logits(restored)
    with pytest.raises(ValueError, match="started from another base model"):
        restored.load_state_dict(state)
    assert torch.equal(logits(restored), before)


@over_cases
def test_state_of_the_trained_tensors_alone(case: Case):
    """Without the frozen ones beside them the numbers would be another adapter's."""
    peft_model = trained(case)
    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    state = {key: tensor for key, tensor in peft_model.state_dict().items() if key in trainable}
    before = logits(peft_model)
    if any("_update." in name for name, _ in peft_model.named_buffers() if name in peft_model.state_dict()):
        with pytest.raises(ValueError, match="incomplete"):
            peft_model.load_state_dict(state, strict=False)
    else:
        peft_model.load_state_dict(state, strict=False)
    assert torch.equal(logits(peft_model), before)


@over_merging_cases
@pytest.mark.parametrize("loaded_in", [True, False], ids=["loaded-in-inference-mode", "loaded-outside"])
def test_merging_in_another_mode_than_loading(case: Case, loaded_in: bool):
    with torch.inference_mode(loaded_in):
        peft_model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets)).eval()
        perturb(peft_model)
        peft_model.requires_grad_(False)
    output = partial(peft_model, input_ids=tokens())
    expected = output().logits
    with torch.inference_mode(not loaded_in):
        peft_model.merge_adapter()
    merged = output().logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode(not loaded_in):
        peft_model.unmerge_adapter()
    assert torch.equal(output().logits, expected)
    with torch.inference_mode(not loaded_in):
        plain = peft_model.merge_and_unload()
    assert torch.equal(plain(input_ids=tokens()).logits, merged)


@over_cases
def test_a_pickle_is_not_written(case: Case, tmp_path):
    for name in (None, ["default"]):
        with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
            trained(case).save_pretrained(tmp_path, safe_serialization=False, selected_adapters=name)
    assert not list(tmp_path.iterdir())
