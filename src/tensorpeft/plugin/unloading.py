"""Merging and unloading adapters: all layers or none, whoever the tuner is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from tensorpeft.plugin.base_weight import cannot_merge, check_whole
from tensorpeft.plugin.holder import SharedHolder
from tensorpeft.plugin.layer import TensorLayer, check_finite, check_weight_update


@contextmanager
def merging(model: nn.Module, adapter_names: Iterable[str] | None, safe_merge: bool) -> Iterator[None]:
    """PEFT merges inside: these adapters, or the active ones.

    Raises:
        ValueError: one is unknown, no update of a weight or, with `safe_merge`, would make a weight that is not finite.
            After this error, or any other inside, every layer has merged what it had merged before.
    """
    names = None if adapter_names is None else list(adapter_names)
    _check_known(model, names or ())
    _check_mergeable(model, names)
    _check_merged_weights(model, names, safe_merge)
    with _unchanged_on_error(model):
        yield


@contextmanager
def unloading(tuner: BaseTuner, merge: bool, adapter_names: Iterable[str] | None, safe_merge: bool) -> Iterator[None]:
    """PEFT takes the adapters' modules out inside; what the layers shared goes at the end.

    Raises:
        ValueError: see `merging`. After this error, or any other inside, the adapters are where they were. The base
            weights are too, bit for bit, unless what fails is the merging of a layer that could be computed before:
            then up to rounding, as nobody keeps a second copy of them.
    """
    model = tuner.model
    with merging(model, adapter_names, safe_merge) if merge else _unchanged_on_error(model):
        if not merge and any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
            tuner.unmerge_adapter()  # what is merged would stay in the base weights that are handed back
        with _keeping_no_copies(model):
            yield
        _remove_what_is_left(model)


def _check_known(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Raise a `ValueError` if there is no adapter of one of these names: unloading would lose those that there are."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    known = {
        name for module in model.modules() if isinstance(module, kinds) for name in module._get_available_adapters()
    }
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"adapter_names: there is no adapter {', '.join(unknown)}; loaded are {sorted(known)}.")


def _check_mergeable(model: nn.Module, adapter_names: Iterable[str] | None) -> None:
    """Raise a `ValueError` if a weight is partitioned, or one of these adapters, or an active one, is not to be merged.

    One that is active and not to be merged counts too: what it adds depends on what the others have added before.
    """
    readers = _readers(model)
    for layer in _layers(model):
        check_whole(layer.get_base_layer(), layer.name)
        names = {*(adapter_names or ()), *layer.active_adapters} & set(layer.updates)
        for name in names:
            check_weight_update(name, layer.updates[name])
        backend = layer.quantization_backend
        if names and backend is not None and not backend.supports_merge:
            raise ValueError(f"{layer.name}: {cannot_merge(backend.backend_name)}")
        names_of_readers = readers.get(getattr(layer.get_base_layer(), "weight", None), []) if names else []
        if others := [name for name in names_of_readers if name != layer.name]:
            raise ValueError(
                f"{others[0]} and {layer.name} are one weight: merged, the update of {layer.name} would be one of "
                f"{others[0]}, too. Keep the adapter beside the model, or give the layers weights of their own before "
                "it is added (a language model's head and its embeddings: tie_word_embeddings=False)."
            )


def _readers(model: nn.Module) -> dict[object, list[str]]:
    """The modules that have each weight, by name; what has two names within its parents is there twice."""
    readers = dict[object, list[str]]()
    for parent_name, parent in model.named_modules():
        for name, module in parent._modules.items():
            known = parent.name if isinstance(parent, TensorLayer) else f"{parent_name}.{name}".removeprefix(".")
            for parameter in () if module is None else module._parameters.values():
                if parameter is not None:
                    readers.setdefault(parameter, []).append(known)
    return readers


def _check_merged_weights(model: nn.Module, adapter_names: Iterable[str] | None, safe_merge: bool) -> None:
    """Make every merged weight once, one in memory at a time, so that what cannot be made fails before any is set."""
    for layer in _layers(model):
        names = [name for name in adapter_names or layer.active_adapters if name in layer.updates]
        names = [name for name in names if name not in layer.merged_adapters]
        if names and not any(tensor.is_meta for tensor in layer.get_base_layer().parameters()):  # offloaded
            weight = layer.merged_weight(names)
            _check_own_forward(layer, weight, names)
            if safe_merge:
                check_finite(weight, names)


@torch.no_grad()
def _check_own_forward(layer: TensorLayer, merged: Tensor, adapter_names: Iterable[str]) -> None:
    """Raise a `ValueError` if a class of linear layers multiplies by something else than its weight, on one input."""
    base: Any = layer.get_base_layer()
    if not isinstance(base, nn.Linear) or type(base) is nn.Linear or layer.quantization_backend is not None:
        return
    x = torch.linspace(-1, 1, base.in_features, dtype=merged.dtype, device=merged.device)[None]
    before = base(x)
    added = torch.stack([layer.updates[name](x).to(before.dtype) for name in adapter_names]).sum(0)
    error = (torch.func.functional_call(base, {"weight": merged}, (x,)) - (before + added)).abs().max()
    rounding = 4 * torch.finfo(merged.dtype).eps * (x.abs() @ merged.abs().t()).max()
    if error > 0.05 * added.abs().max() + rounding:
        raise ValueError(
            f"{layer.name}: a {type(base).__name__} does not multiply by its weight as a linear layer does, so that an "
            "update that is merged into it would be another one. Keep the adapter beside the model, or name the layer "
            "in exclude_modules."
        )


def _layers(model: nn.Module) -> list[TensorLayer]:
    return [module for module in model.modules() if isinstance(module, TensorLayer)]


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put PEFT's modules back, with what they had merged, if what runs inside fails."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, kinds)
    ]
    merged = [(child, list(child.merged_adapters)) for _, _, child in places if isinstance(child, BaseTunerLayer)]
    try:
        yield
    except BaseException:
        for parent, name, child in places:
            setattr(parent, name, child)
        for layer, names in merged:
            if layer.merged_adapters != names:
                if layer.merged:
                    layer.unmerge()
                if names:
                    layer.merge(adapter_names=names)
        raise


@contextmanager
def _keeping_no_copies(model: nn.Module) -> Iterator[None]:
    """Layers that merge inside keep no copy of a plain base weight, which would take the model's memory again."""
    layers = [layer for layer in _layers(model) if layer.owns_base and layer.quantization_backend is None]
    for layer in layers:
        layer.owns_base = False
    try:
        yield
    finally:
        for layer in layers:
            layer.owns_base = True


def _remove_what_is_left(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SharedHolder):
                delattr(parent, name)
            elif isinstance(child, TrainableTokensWrapper):  # PeftMixedModel unloads only what is inside
                setattr(parent, name, child.token_adapter)
