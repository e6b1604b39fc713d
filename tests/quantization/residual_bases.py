"""The tiny models as residual bases, with and without an adapter."""

from peft import PeftModel, get_peft_model
from torch import nn

from cases import Model, logits, perturb
from tensorpeft import DotaConfig
from tensorpeft.quantization import quantize_residual


def config_of(model: Model, **more) -> DotaConfig:
    return DotaConfig(**{"r": 6, "num_cores": 3, "target_modules": model.targets, "task_type": model.task_type, **more})


def base_of(model: Model, **more) -> nn.Module:
    """The same residual base at every call, in evaluation mode."""
    return quantize_residual(model.fresh(), config_of(model), **more)


def adapted(model: Model, base: nn.Module | None = None, **more) -> PeftModel:
    return get_peft_model(base_of(model, **more) if base is None else base, config_of(model)).eval()


def trained(model: Model, base: nn.Module | None = None) -> PeftModel:
    """An adapter that has moved, on a base that has run in evaluation: bitsandbytes then repacks what it can."""
    peft_model = adapted(model, base)
    perturb(peft_model)
    logits(peft_model)
    return peft_model
