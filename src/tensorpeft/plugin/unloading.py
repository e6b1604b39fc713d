"""Merging and unloading adapters: all layers or none, whoever the tuner is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn

from tensorpeft.plugin.holder import SharedHolder
from tensorpeft.plugin.layer import check_finite, layers_of
from tensorpeft.plugin.merge_checks import check_mergeable, check_own_forward


@contextmanager
def merging(model: nn.Module, adapter_names: Iterable[str] | None, safe_merge: bool) -> Iterator[None]:
    """PEFT merges inside: these adapters, or the active ones.

    Raises:
        ValueError: one is unknown, no update of a weight or, with `safe_merge`, would make a weight that is not finite;
            or a weight cannot be merged into (`check_mergeable`, `check_own_forward`). After this error, or any other
            inside, every layer has merged what it had merged before.
    """
    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names={adapter_names!r}: expected a list of names, such as [{adapter_names!r}].")
    names = None if adapter_names is None else list(adapter_names)
    _check_known(model, names or ())
    check_mergeable(model, names)
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


def _check_merged_weights(model: nn.Module, adapter_names: Iterable[str] | None, safe_merge: bool) -> None:
    """Make every merged weight once, one in memory at a time, so that what cannot be made fails before any is set."""
    for layer in layers_of(model):
        names = [name for name in adapter_names or layer.active_adapters if name in layer.updates]
        names = [name for name in names if name not in layer.merged_adapters]
        if names and not any(tensor.is_meta for tensor in layer.get_base_layer().parameters()):  # offloaded
            weight = layer.merged_weight(names)
            check_own_forward(layer, names)
            if safe_merge:
                check_finite(weight, names)


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
    layers = [layer for layer in layers_of(model) if layer.owns_base and layer.quantization_backend is None]
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
