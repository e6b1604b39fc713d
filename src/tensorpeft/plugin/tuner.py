"""The one tuner: finds the sites, lets the method build an update for each, wraps the layers. It knows no method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import _get_submodules
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from tensorpeft.networks.update import AbstractUpdatableLinear, AbstractUpdate
from tensorpeft.plugin.base_weight import (
    UpdatableBackend,
    as_matrix,
    check_reachable,
    check_whole,
    convolution_of,
    find_backend,
    layer_shape,
    onloaded,
    present,
    restore_row_order,
)
from tensorpeft.plugin.checkpoint import shapes_to_load
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.holder import SharedHolder, UpdateHolder
from tensorpeft.plugin.layer import TensorLayer, check_finite, check_weight_update
from tensorpeft.plugin.loading import check_checkpoint, check_starts, check_state_dict, check_tensors, own_key
from tensorpeft.sites import Site, find_sites


class MethodClasses(NamedTuple):
    """A method's own classes, made by `plugin.registration`: PEFT tells methods apart by class."""

    layer: type[TensorLayer]
    shared: type[SharedHolder]


class TensorModel(BaseTuner):
    """A model whose target layers carry updates. Each method has a subclass, made by `plugin.registration`."""

    tuner_layer_cls = UpdateHolder
    classes = MethodClasses(TensorLayer, SharedHolder)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As PEFT's. Every update is built before the first layer is wrapped: an error leaves the model as it was.

        A state dict of shared factors alone names no layers: they are the configuration's.
        """
        self._allocates_only = low_cpu_mem_usage
        names = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict or ()}
        if names == {_name_of_owner(self.classes)}:
            state_dict = None
        self._injected_names = None if state_dict is None else names
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self._planned = None

    def _create_and_replace(
        self,
        peft_config: TensorConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        wrap_layer(self, self.classes, peft_config, adapter_name, current_key)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # Of the whole tuner, before its first layer is loaded: a checkpoint that does not fit changes nothing.
        self.register_load_state_dict_pre_hook(check_state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        checked = check_checkpoint(model, config, adapter_name, state_dict)
        if not any(isinstance(module, TensorModel) for module in model.modules()):  # whose own hook asks
            check_starts(model, adapter_name, checked)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, checked)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Updates are float32. `autocast_adapter_dtype=False` asks for the base model's dtype instead."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for module in self.model.modules():
            if isinstance(module, UpdateHolder) and adapter_name in module.updates:
                _, dtype = module._get_base_layer_device_and_dtype(module.get_base_layer())
                if dtype is not None and dtype.is_floating_point:
                    module.updates[adapter_name].to(dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's; with `safe_merge` every layer is checked before the first one is changed."""
        check_mergeable(self.model, adapter_names)
        if safe_merge:
            check_merged_weights(self.model, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            check_mergeable(self.model, adapter_names)
        if merge and safe_merge:
            check_merged_weights(self.model, adapter_names)
        if not merge:
            self.unmerge_adapter()  # what is merged would stay in the base weights that are handed back
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        remove_shared_factors(self.model)
        return model  # type: ignore[return-value]

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """As PEFT's.

        Args:
            progressbar: PEFT's.
            safe_merge: PEFT's.
            adapter_names: PEFT's.
            dtype: of the weights that a residual base (QDoTA) gets; None: that of the model.
        """
        with _merging_in(self.model, dtype):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand each layer its rows' adapters while a forward or generate call with `adapter_names` runs."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call `eval()` first.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; loaded are "
                f"{', '.join(sorted(self.peft_config))}, and '__base__' for none."
            )
        num_beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1
        repeated = [name for name in adapter_names for _ in range(num_beams)]
        in_encoder = _encoder_modules(self.model)
        with ExitStack() as stack:
            for module in self.modules():
                # modules_to_save have a copy per adapter too.
                if isinstance(module, (TensorLayer, AuxiliaryTrainingWrapper)):
                    # Beams are rows of a decoder's batch, not of its encoder's.
                    names = adapter_names if module in in_encoder else repeated
                    handle = module.register_forward_pre_hook(partial(_pass_names, names), with_kwargs=True)
                    stack.callback(handle.remove)
            yield


def wrap_layer(
    tuner: BaseTuner,
    classes: MethodClasses,
    config: TensorConfig,
    adapter_name: str,
    key: str,  # full name of the layer in the model
) -> None:
    """Give the layer `key` its update of a new adapter; at the first layer of an adapter, build all of them.

    A function of any tuner: PEFT's MixedModel, which holds adapters of several methods, calls it too.

    Raises:
        ValueError: the method cannot adapt a target, or serve it.
    """
    key = key.removeprefix("base_model.model.")  # PeftMixedModel adds its second adapter from its own root
    planned: tuple[Any, dict[str, AbstractUpdate]] | None = getattr(tuner, "_planned", None)
    if planned is None or planned[0] is not config or key not in planned[1]:
        if (shapes := shapes_to_load()) is not None:
            _check_shapes(tuner, classes, config, shapes)
        planned = (config, dict(build_updates(tuner, config)))
        tuner._planned = planned  # type: ignore[assignment]
    update = planned[1].pop(key)
    parent, target, target_name = _get_submodules(tuner.model, key)
    with onloaded(base := _innermost(target)):  # the update goes to where the layer computes
        if isinstance(target, classes.layer):
            target.hold(adapter_name, update, config.inference_mode)
            layer = target
        else:
            backend = find_backend(base, **get_quantization_kwargs(tuner.model))
            shape = layer_shape(base, key, parent, backend, config.adapts_convolutions)
            owns_base = isinstance(tuner, TensorModel) and not isinstance(target, BaseTunerLayer)
            layer = classes.layer(target, shape, backend, owns_base).train(target.training)
            layer._active_adapter = adapter_name
            layer.hold(adapter_name, update, config.inference_mode)
            tuner._replace_module(parent, target_name, layer, target)
    is_active = adapter_name in tuner.active_adapters
    if not is_active:
        update.requires_grad_(False)
    if update.shared is not None:
        owner = _owner_of_shared(tuner.model, layer, classes)
        if adapter_name not in owner.updates or owner.updates[adapter_name] is not update.shared:
            owner.hold(adapter_name, update.shared, config.inference_mode)
            update.shared.requires_grad_(is_active and not config.inference_mode)


def check_mergeable(model: nn.Module, adapter_names: Iterable[str] | None = None) -> None:
    """Raise a `ValueError` if a weight is partitioned, or one of these adapters, or an active one, is no update of it.

    One that is active and not to be merged counts too: what it adds depends on what the others have added before.
    """
    for key, module in model.named_modules():
        if isinstance(module, TensorLayer):
            check_whole(module.get_base_layer(), key)
            for name in {*(adapter_names or ()), *module.active_adapters} & set(module.updates):
                check_weight_update(name, module.updates[name])


def check_merged_weights(model: nn.Module, adapter_names: Iterable[str] | None = None) -> None:
    """Raise a `ValueError` if merging these adapters, or the active ones, would make a weight that is not finite."""
    for module in model.modules():
        if isinstance(module, TensorLayer):
            names = [name for name in adapter_names or module.active_adapters if name in module.updates]
            names = [name for name in names if name not in module.merged_adapters]
            if names:
                check_finite(module.merged_weight(names), names)


def _check_shapes(tuner: BaseTuner, classes: MethodClasses, config: TensorConfig, shapes: dict[str, Tensor]) -> None:
    """Raise a `ValueError` unless a checkpoint's tensors are those of this adapter. Allocates nothing."""
    sites, bases = bases_of(tuner, config)
    config.settle(sites, bases)
    with torch.device("meta"):
        updates = config.build(sites, replace(bases, allocates_only=True))
    attribute = classes.layer.adapter_layer_names[0]
    modules: dict[str, nn.Module] = {f"{name}.{attribute}.": update for name, update in updates.items()}
    shared = [update.shared for update in updates.values() if update.shared is not None]
    if shared:
        modules[f"{_name_of_owner(classes)}.{attribute}."] = shared[0]
    check_tensors(modules, {own_key(key): tensor for key, tensor in shapes.items()}, config)


def _name_of_owner(classes: MethodClasses) -> str:
    # Not under the method's prefix: PEFT's delete_adapter passes over names that contain it.
    return f"shared_{classes.layer.adapter_layer_names[0].removesuffix('_update')}"


def _owner_of_shared(model: nn.Module, layer: TensorLayer, classes: MethodClasses) -> SharedHolder:
    """The owner of what the layers of a method share, made at first use."""
    name = _name_of_owner(classes)
    if not hasattr(model, name):
        owner = classes.shared(layer)
        owner._active_adapter = layer._active_adapter
        model.add_module(name, owner)
    return getattr(model, name)


def remove_shared_factors(model: nn.Module) -> None:
    """Take out what the adapters of an unloaded model shared."""
    for name, module in list(model.named_children()):
        if isinstance(module, SharedHolder):
            delattr(model, name)


def build_updates(tuner: BaseTuner, config: TensorConfig) -> Mapping[str, AbstractUpdate]:
    """The method's updates for all targets of a config, which is settled first. Changes nothing in the model."""
    sites, bases = bases_of(tuner, config)
    config.settle(sites, bases)
    return config.build(sites, replace(bases, allocates_only=getattr(tuner, "_allocates_only", False)))


def bases_of(tuner: BaseTuner, config: TensorConfig) -> tuple[list[Site], _Bases]:
    """All targets of a config, and what the model has there."""
    quantization = get_quantization_kwargs(tuner.model)
    layers: dict[str, tuple[nn.Module, Any]] = {}
    shapes = []
    for name in _target_names(tuner, config):
        parent, target, _ = _get_submodules(tuner.model, name)
        base = _innermost(target)
        backend = find_backend(base, **quantization)
        out, in_ = layer_shape(base, name, parent, backend, config.adapts_convolutions)
        check_reachable(base, name, tuner.model)
        layers[name] = (base, backend)
        shapes.append((name, out, in_))
    sites = [
        replace(site, convolution=convolution_of(layers[site.name][0]))
        for site in find_sites(shapes, getattr(tuner.model, "config", None))
    ]
    return sites, _Bases(layers)


@dataclass(frozen=True)
class _Bases:
    """What `TensorConfig.build` reads of the model. Layers by name, with PEFT's quantisation backend."""

    layers: Mapping[str, tuple[nn.Module, Any]]
    allocates_only: bool = False

    def read_weight(self, site: Site) -> Tensor:
        base, backend = self.layers[site.name]
        if self.allocates_only:
            return torch.empty(site.out, site.num_columns, device="meta")
        with present(base):
            restore_row_order(base)
            weight = base.weight.data if backend is None else backend.get_base_weight(base)
            return as_matrix(base, weight)  # type: ignore[arg-type]

    def start(self, site: Site) -> nn.Module | None:
        base, _ = self.layers[site.name]
        return base.start if isinstance(base, AbstractUpdatableLinear) else None


def _target_names(tuner: BaseTuner, config: TensorConfig) -> list[str]:
    """The full names of the layers that PEFT is going to adapt for a config, in the model's order."""
    injected: set[str] | None = getattr(tuner, "_injected_names", None)
    is_target: Callable[[str], Any]
    is_target = partial(tuner._check_target_module_exists, config) if injected is None else injected.__contains__
    names: list[str] = []
    wrapped: tuple[str, ...] = ()
    for name, module in tuner.model.named_modules():
        if name and not name.startswith(wrapped) and is_target(name):
            names.append(name)
        if isinstance(module, BaseTunerLayer):
            wrapped += (f"{name}.",)  # what lies in there belongs to an earlier adapter
    return names


def _innermost(target: nn.Module) -> nn.Module:
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


@contextmanager
def _merging_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """While it is open, layers that are made plain by merging get this dtype; those merged before are merged anew."""
    layers = [module for module in model.modules() if isinstance(module, TensorLayer)]
    layers = [
        layer for layer in layers if dtype is not None and isinstance(layer.quantization_backend, UpdatableBackend)
    ]
    backends = [layer.quantization_backend for layer in layers]
    for layer, backend in zip(layers, backends):
        backend.dtype = dtype  # type: ignore[union-attr]
        if layer.merged:
            names = list(layer.merged_adapters)
            layer.unmerge()
            layer.merge(adapter_names=names)
    try:
        yield
    finally:
        for backend in backends:
            backend.dtype = None  # type: ignore[union-attr]


def _encoder_modules(model: nn.Module) -> set[nn.Module]:
    """All modules of an encoder-decoder's encoder; empty for other models (their `get_encoder` returns themselves)."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None  # type: ignore[operator]
    return set() if encoder is None or encoder is model else set(encoder.modules())


def _pass_names(adapter_names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": adapter_names}
