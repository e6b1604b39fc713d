"""The tiny models as residual bases, with and without an adapter, and what their states are compared by."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from cases import Model, logits, perturb
from tensorpeft import DotaConfig
from tensorpeft.quantization import quantize_residual


def config_of(model: Model, **more) -> DotaConfig:
    return DotaConfig(**{"r": 6, "num_cores": 3, "target_modules": model.targets, "task_type": model.task_type, **more})


def fresh(model: Model) -> nn.Module:
    """The same weights at every call, biases that are not zero, in evaluation mode."""
    plain, generator = model.fresh(), torch.Generator().manual_seed(7)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return plain


def base_of(model: Model, **more) -> nn.Module:
    """The same residual base at every call, in evaluation mode."""
    return quantize_residual(fresh(model), config_of(model), **more)


def adapted(model: Model, base: nn.Module | None = None, **more) -> PeftModel:
    return get_peft_model(base_of(model, **more) if base is None else base, config_of(model)).eval()


def trained(model: Model, base: nn.Module | None = None) -> PeftModel:
    """An adapter that has moved, on a base that has run in evaluation: bitsandbytes then repacks what it can."""
    peft_model = adapted(model, base)
    perturb(peft_model)
    logits(peft_model)
    return peft_model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(expected)
    assert [value.dtype for value in found.values()] == [value.dtype for value in expected.values()]
    assert all(torch.equal(found[key], value) for key, value in expected.items())
