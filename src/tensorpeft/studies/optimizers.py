"""What the studies' runs train with: AdamW, or a method's own optimiser. The new head has a rate of its own."""

from collections.abc import Callable

import torch
from peft.optimizers import create_lorafa_optimizer
from torch import nn
from torch.optim import Optimizer

MakeOptimizer = Callable[[nn.Module, float, float], Optimizer]  # of a model, its rate and its head's


def _is_head(name: str) -> bool:
    return "classifier." in name


def adamw(model: nn.Module, rate: float, head_rate: float) -> Optimizer:
    """AdamW without weight decay on all that is trained."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_is_head(name)].append(parameter)
    parameters = [{"params": group, "lr": head_rate if is_head else rate} for is_head, group in groups.items()]
    return torch.optim.AdamW(parameters, weight_decay=0.0)


def lora_fa(model: nn.Module, rate: float, head_rate: float) -> Optimizer:
    """LoRA-FA (arXiv 2308.03303) as PEFT has it, for a LoRA: freezes every A, corrects B's gradient for it."""
    config = model.peft_config["default"]  # type: ignore[index]
    optimizer = create_lorafa_optimizer(model, config.r, config.lora_alpha, rate)  # type: ignore[arg-type]
    (group,) = optimizer.param_groups
    optimizer.param_groups = []
    for is_head, lr in ((False, rate), (True, head_rate)):
        places = [k for k, name in enumerate(group["names"]) if _is_head(name) == is_head]
        chosen = {key: [group[key][k] for k in places] for key in ("params", "names", "scaling_factors")}
        optimizer.param_groups.append({**group, **chosen, "lr": lr})
    return optimizer
