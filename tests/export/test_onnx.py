"""The lines of docs/export.md that make an ONNX file of a merged model, run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM

from cases import logits, perturb, tiny_llama, tokens
from tensorpeft import DotaConfig

DOCS = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.mark.thorough
def test_onnxruntime_computes_what_the_adapter_does_for_any_batch_and_length(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained("base"),
        DotaConfig(r=6, num_cores=3, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    perturb(adapted)
    adapted.save_pretrained("ADAPTER")
    section = DOCS.read_text(encoding="utf-8").partition("\n## ONNX\n")[2]
    (code, *_) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(code, {})
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    model = AutoPeftModelForCausalLM.from_pretrained("ADAPTER").eval()
    for batch, length in ((3, 7), (1, 9), (5, 4)):
        inputs, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
        mask[0, -2:] = 0
        (found,) = session.run(None, {"input_ids": inputs.numpy(), "attention_mask": mask.numpy()})
        expected = logits(model, inputs, attention_mask=mask)
        torch.testing.assert_close(torch.from_numpy(found)[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=0)
    with model.disable_adapter():
        assert (logits(model, inputs, attention_mask=mask) - expected).abs().max() > 1e-3
