"""Bases that can be trained on and not merged into: only the merge is refused, and before anything is changed."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn

from cases import MODELS, Case, logits, named, perturb, tokens

over_some_cases = pytest.mark.parametrize("case", named("dota", "lorta", "lotr"), ids=lambda case: case.name)


def quantized() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = MODELS[0].fresh()
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    return model


@over_some_cases
def test_a_base_quantised_by_torchao_alone_is_trained_and_not_merged_into(case: Case, tmp_path):
    """Nobody has said how a merged weight would be quantised again."""
    base = logits(quantized())
    model = get_peft_model(quantized(), case.make(target_modules=MODELS[0].targets)).eval()
    assert torch.equal(logits(model), base)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=case.rate)
    losses = []
    for _ in range(5):
        losses.append(model(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    trained = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: its weight is quantised by torchao"):
            merge()
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(), tmp_path).eval()), trained)
    assert torch.equal(logits(model.unload()), base)


@over_some_cases
def test_one_base_layer_that_cannot_be_merged_into_keeps_all_as_they_are(case: Case):
    model = get_peft_model(MODELS[0].fresh(), case.make(target_modules=MODELS[0].targets)).eval()
    perturb(model)
    trained = logits(model)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: its weight is quantised by gptq"):
            merge()
    assert not any(getattr(module, "merged_adapters", None) for module in model.modules())
    assert torch.equal(logits(model), trained)
