"""torch.export of a model with an adapter that is not merged, for batches and lengths that are not known yet."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.export import Dim

from cases import CASES, MODELS, logits, perturb, tiny_llama, tokens

IN_DEFAULT_SUITE = "quanta"  # whose route depends on the number of rows


class LogitsOf(nn.Module):
    """A model of tokens alone, that returns a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name == IN_DEFAULT_SUITE else pytest.mark.thorough)
        for case in CASES
    ],
)
def test_any_batch_and_length_of_an_unmerged_adapter(case):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(num_hidden_layers=1).eval(), case.make(target_modules=MODELS[0].targets)).eval()
    perturb(model)
    sizes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(LogitsOf(model), (tokens(3, 7),), dynamic_shapes=sizes)
        for batch, length in ((2, 4), (40, 50)):  # few rows and many: on both sides of a rule that counts them
            inputs = tokens(batch, length)
            torch.testing.assert_close(program.module()(inputs), logits(model, inputs), atol=2e-5, rtol=2e-5)
