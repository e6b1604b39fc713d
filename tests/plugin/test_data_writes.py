"""Writes through `.data`, as averages of weights and older optimisers have them: torch does not count them.

The next forward has them all the same.
"""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from cases import MODELS, Case, logits, over_cases, perturb, tokens
from tensorpeft.networks.update import AbstractUpdate, SharedFactors
from tensorpeft.plugin.layer import TensorLayer

LLAMA = MODELS[0]


def adapted(case: Case, num_adapters: int = 1) -> nn.Module:
    config = case.make(target_modules=LLAMA.targets, task_type="CAUSAL_LM")
    model = get_peft_model(LLAMA.fresh(), config).eval()
    for k in range(1, num_adapters):
        model.add_adapter(str(k), config)
        model.set_adapter(str(k))
        perturb(model, seed=k)
    model.set_adapter("default")
    perturb(model)
    return model


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen(model: nn.Module) -> list[Tensor]:
    """Starts and random bases."""
    modules = [module for module in model.modules() if isinstance(module, (AbstractUpdate, SharedFactors))]
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


def bases(model: nn.Module) -> list[Tensor]:
    return [module.get_base_layer().weight for module in model.modules() if isinstance(module, TensorLayer)]


def write(tensors: list[Tensor], seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    versions = [tensor._version for tensor in tensors]
    for tensor in tensors:
        tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    assert [tensor._version for tensor in tensors] == versions


def afresh(model: nn.Module) -> nn.Module:
    """A copy that has kept nothing."""
    copied = copy.deepcopy(model)
    return copied.train().train(model.training)


@over_cases
def test_an_evaluation_sees_them(case: Case):
    model = adapted(case)
    after = logits(model)
    for tensors in (trained(model), frozen(model), bases(model), trained(model)):
        before = after
        write(tensors)
        after = logits(model)
        assert torch.equal(after, logits(afresh(model)))
        assert torch.equal(after, before) == (not tensors)


@over_cases
@pytest.mark.parametrize("num_adapters", [pytest.param(2, marks=pytest.mark.thorough), 5])
def test_a_mixed_batch_sees_them(case: Case, num_adapters: int):
    model = adapted(case, num_adapters)
    names = ["default", *map(str, range(1, num_adapters)), "__base__"]
    inputs = tokens(batch=len(names))
    before = logits(model, inputs, adapter_names=names)
    write([*trained(model), *frozen(model)])
    after = logits(model, inputs, adapter_names=names)
    assert torch.equal(after, logits(afresh(model), inputs, adapter_names=names))
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[-1], before[-1])


@over_cases
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_layer_sees_those_since_another_one_was_called(case: Case, mode: bool):
    """An encoder and a decoder, or a router's experts, are not called together."""
    model = adapted(case).train(mode)
    first, second = model.get_base_model().model.layers
    x, angles = torch.randn(1, 3, 24), (torch.ones(1, 3, 6), torch.zeros(1, 3, 6))
    before = second(x, position_embeddings=angles)
    for _ in range(2):
        first(x, position_embeddings=angles).sum().backward()
    write(trained(model))
    after = second(x, position_embeddings=angles)
    copied = afresh(model)
    assert torch.equal(after, copied.get_base_model().model.layers[1](x, position_embeddings=angles))
    assert not torch.equal(after, before)
