"""What must hold of all layers before an update is put into one of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tensorpeft.plugin.base_weight import cannot_merge, check_whole
from tensorpeft.plugin.evaluation_mode import evaluation_mode
from tensorpeft.plugin.layer import TensorLayer, check_weight_update, layers_of

# Parameters of which torch's older weight_norm, spectral_norm and pruning make the weight, at every call.
_SOURCES = ("weight_g", "weight_orig")


def check_mergeable(model: nn.Module, adapter_names: Iterable[str] | None) -> None:
    """Raise a `ValueError` if one of these adapters, or an active one, is not to be merged, or not into a weight.

    One that is active and not to be merged counts too: what it adds depends on what the others have added before. A
    weight is not merged into if it is partitioned, computed from other parameters, or one that another layer reads.
    """
    readers = _readers(model)
    for layer in layers_of(model):
        base: Any = layer.get_base_layer()
        check_whole(base, layer.name)
        names = {*(adapter_names or ()), *layer.active_adapters} & set(layer.updates)
        for name in names:
            check_weight_update(name, layer.updates[name])
        if not names:
            continue
        backend = layer.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(f"{layer.name}: {cannot_merge(backend.backend_name)}")
        if parametrize.is_parametrized(base, "weight") or any(name in base._parameters for name in _SOURCES):
            raise ValueError(
                f"{layer.name}: its weight is computed from other parameters at every call (a norm, pruning), so that "
                "what is merged would be lost. Make it a plain weight first (torch.nn.utils.parametrize."
                "remove_parametrizations, remove_weight_norm, prune.remove), or keep the adapter beside the model."
            )
        others = readers.get(getattr(base, "weight", None), [])
        if len(others) > 1:
            raise ValueError(
                f"{' and '.join(sorted(others)[:2])} are one weight: merged, the update of {layer.name} would be one "
                "of both. Keep the adapter beside the model, or give the layers weights of their own before it is "
                "added (a language model's head and its embeddings: tie_word_embeddings=False)."
            )


def _readers(model: nn.Module) -> dict[object, list[str]]:
    """The modules that have each weight, by name; a module that is a child under two names, under both.

    Adapted ones are called as without their adapters. What PEFT keeps of a module that it trains a copy of is left out.
    """
    readers = dict[object, list[str]]()
    for parameter in _parameters_of(model):
        readers.setdefault(parameter, []).append("the model itself")
    for parent_name, parent in model.named_modules():
        if isinstance(parent, BaseTunerLayer):
            continue  # its base is looked at where it stands
        for name, module in parent._modules.items():
            while isinstance(module, BaseTunerLayer):
                module = getattr(module, "base_layer", None)  # a holder of shared factors has none
            if module is None or (name == "original_module" and _is_replaced(parent)):
                continue
            for parameter in _parameters_of(module):
                readers.setdefault(parameter, []).append(f"{parent_name}.{name}".removeprefix("."))
    return readers


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _is_replaced(parent: nn.Module) -> bool:
    if not isinstance(parent, ModulesToSaveWrapper):
        return False
    return not parent.disable_adapters and any(name in parent.modules_to_save for name in parent.active_adapters)


@torch.no_grad()
def check_own_forward(layer: TensorLayer, adapter_names: Sequence[str]) -> None:
    """Raise a `ValueError` if a subclass of `nn.Linear` multiplies by something else than its weight.

    It is asked in evaluation mode, in float32, what it makes of one input with its weight, and with the merged one. (So
    are the hooks that it has.) What cannot be asked, as it takes more than an input, is believed.
    """
    base: Any = layer.get_base_layer()
    if not isinstance(base, nn.Linear) or type(base) is nn.Linear or layer.quantization_backend is not None:
        return
    # Of buffers, too: a frozen weight may be one.
    tensors = {name: tensor.float() for name, tensor in base.state_dict(keep_vars=True).items()}
    if "weight" not in tensors:
        return
    weight = tensors["weight"]
    updates: list[Any] = [layer.updates[name] for name in adapter_names]
    delta = torch.stack([update.matrix().to(weight) for update in updates]).sum(0)
    # Irregular, and with a mean: one that an input or a weight is centred by would be seen.
    x = torch.arange(base.in_features, dtype=torch.float32, device=weight.device).cos().add(0.3).view(1, 1, -1)

    def output(matrix: Tensor) -> Tensor:
        return torch.func.functional_call(base, {**tensors, "weight": matrix}, (x,))  # type: ignore[no-any-return]

    try:
        with evaluation_mode(base):
            before, after = output(weight), output(weight + delta)
    except Exception:  # of whoever wrote the class
        return
    expected = torch.nn.functional.linear(x, delta)
    eps = max(torch.finfo(after.dtype).eps, 1e-3 if after.is_cuda else 0)  # a GPU may multiply in TF32
    rounding = 4 * eps * (x.abs() @ weight.abs().t()).max()
    if (after - before - expected).abs().max() > 0.05 * expected.abs().max() + rounding:
        raise ValueError(
            f"{layer.name}: a {type(base).__name__} does not multiply by its weight as a linear layer does, so that an "
            "update that is merged into it would be another one. Keep the adapter beside the model, or name the layer "
            "in exclude_modules."
        )
