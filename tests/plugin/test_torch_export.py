"""torch.export, torch.jit.trace and ONNX files of a model with an adapter that is not merged."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.export import Dim

from cases import CASES, MODELS, Case, logits, named, over_cases, perturb, tiny_llama, tokens

# One for every kind of network, but the angles of Quantum-PEFT, whose graph takes half a minute.
IN_ONNX = ("dota", "lorta", "lotr", "nola", "quanta", "superlora", "lora-pt", "loretta-adapter")
IN_DEFAULT_SUITE = "quanta"  # whose route depends on the number of rows


class LogitsOf(nn.Module):
    """A model of tokens alone, that returns a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def two_layers(case: Case) -> PeftModel:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(24, 44), nn.ReLU(), nn.Linear(44, 24))
    model = get_peft_model(mlp, case.make(target_modules=["0", "2"]))
    perturb(model)
    return model


@over_cases
def test_who_records_what_a_model_does_gets_what_it_does(case: Case):
    """With gradients on, as a model is that has just been trained; and it trains on."""
    model = two_layers(case)
    mlp = model.get_base_model()
    x, other = torch.randn(2, 3, 5, 24, generator=torch.Generator().manual_seed(1))
    expected = model(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of shapes, which a trace has as constants
        traced = torch.jit.trace(mlp, x)
    exported = torch.export.export(mlp.eval(), (x,)).module()
    for recorded in (traced, exported):
        torch.testing.assert_close(recorded(other), expected)
    model.train()(other).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.thorough
@pytest.mark.parametrize("case", named(*IN_ONNX), ids=lambda case: case.name)
def test_an_onnx_file_of_any_rows(case: Case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = two_layers(case).eval()
    x = torch.randn(3, 5, 24)
    sizes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = torch.onnx.export(model.get_base_model(), (x,), dynamic_shapes=sizes, dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((2, 2, 24), (40, 50, 24)):
        x = torch.randn(shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name == IN_DEFAULT_SUITE else pytest.mark.thorough)
        for case in CASES
    ],
)
def test_any_batch_and_length_of_an_unmerged_adapter(case: Case):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(num_hidden_layers=1).eval(), case.make(target_modules=MODELS[0].targets)).eval()
    perturb(model)
    sizes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    program = torch.export.export(LogitsOf(model), (tokens(3, 7),), dynamic_shapes=sizes)
    with torch.no_grad():
        for batch, length in ((2, 4), (40, 50)):  # few rows and many: on both sides of a rule that counts them
            inputs = tokens(batch, length)
            torch.testing.assert_close(program.module()(inputs), logits(model, inputs), atol=2e-5, rtol=2e-5)
