"""The one tuner: finds the sites, lets the method build an update for each, wraps the layers. It knows no method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import _get_submodules
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from tensorpeft.networks.update import AbstractDifference, AbstractUpdate
from tensorpeft.plugin.base_weight import find_backend, is_convolution, layer_shape, onloaded
from tensorpeft.plugin.checkpoint import shapes_to_load
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.experts import ExpertsLayer, target_stacks, warn_of_stacks
from tensorpeft.plugin.holder import SharedHolder, UpdateHolder, home_of_shared
from tensorpeft.plugin.kept_frames import check_cast, copy_frames, take_frames
from tensorpeft.plugin.layer import TensorLayer, merging_in
from tensorpeft.plugin.loading import (
    check_checkpoint,
    check_starts,
    check_state_dict,
    check_tensors,
    key_of,
    own_key,
)
from tensorpeft.plugin.targets import bases_of, build_updates, check_tokens, innermost, settle_order
from tensorpeft.plugin.unloading import merging, unloading
from tensorpeft.plugin.weighted import add_weighted_adapter


class MethodClasses(NamedTuple):
    """A method's own classes, made by `plugin.registration`: PEFT tells methods apart by class."""

    layer: type[TensorLayer]
    convolution: type[TensorLayer]
    shared: type[SharedHolder]
    experts: type[ExpertsLayer]


class TensorModel(BaseTuner):
    """A model whose target layers carry updates. Each method has a subclass, made by `plugin.registration`."""

    tuner_layer_cls = UpdateHolder
    classes = MethodClasses(TensorLayer, TensorLayer, SharedHolder, ExpertsLayer)

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
        config: TensorConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        check_tokens(model, config)
        warn_of_stacks(model, config)
        names = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict or ()}
        if names <= {_name_of_owner(self.classes), _place_of_owner(model, self.classes)}:
            state_dict = None
        self._injected_names = None if state_dict is None else names
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self._planned = None

    # LoRA's, which reads nothing but the model.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie  # type: ignore[assignment]

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            "ensure_weight_tying=True: the adapter of a tied layer cannot be tied to one of the input embeddings, "
            f"which are no linear layer. Take {', '.join(sorted(tied_weight_keys))} out of target_modules, or name it "
            "in modules_to_save instead."
        )

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

    def _inject_parameters(
        self, peft_config: TensorConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        stacks = target_stacks(model, peft_config, self._check_target_module_exists)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for stack in stacks:
                keys = list(stack.weights())
                _plan(self, self.classes, peft_config, adapter_name, keys[0])
                stack.split(model, self.classes.experts)
                for key in keys:
                    wrap_layer(self, self.classes, peft_config, adapter_name, key)
        return [stack.name for stack in stacks]

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # Of the whole tuner, before its first layer is loaded: a checkpoint that does not fit changes nothing.
        self.register_load_state_dict_pre_hook(check_state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        owner = (name for name, module in model.named_modules() if isinstance(module, cls.classes.shared))
        state_dict = _with_owner_in_place(own_key(key_of(next(owner, ""))), cls.classes, state_dict)
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
                    check_cast(update := module.updates[adapter_name], dtype)
                    if isinstance(update, AbstractDifference):
                        update.may_round = True  # it is asked for
                    update.to(dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, in all layers or, after an error, in none."""
        with merging(self.model, adapter_names, safe_merge):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        with unloading(self, merge, adapter_names, safe_merge):
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return model  # type: ignore[return-value]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As LoRA's: what comes out of a wrapper has parameters of its own, and need not have a `weight`."""
        setattr(parent, child_name, new_module)

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
        with merging_in(self.model, dtype):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """As LoRA's, by concatenation: see `plugin.weighted`.

        Args:
            adapters: names of the adapters to combine.
            weights: one for each, of either sign.
            adapter_name: of the new adapter.
            combination_type: "cat".

        Raises:
            ValueError: another type; see `plugin.weighted`.
        """
        if combination_type != "cat":
            raise ValueError(
                f'combination_type={combination_type!r}: expected "cat", which is exact; the others round.'
            )
        add_weighted_adapter(self, adapters, weights, adapter_name)

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
                if isinstance(module, (TensorLayer, ExpertsLayer, AuxiliaryTrainingWrapper)):
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
    own = _own_key_of(tuner.model, key)
    update = _plan(tuner, classes, config, adapter_name, own, key.removesuffix(own)).pop(own)
    key = own
    parent, target, target_name = _get_submodules(tuner.model, key)
    with onloaded(base := innermost(target)):  # the update goes to where the layer computes
        if isinstance(target, (classes.layer, classes.convolution)):
            target.hold(adapter_name, update, config.inference_mode)
            layer = target
        else:
            backend = find_backend(base, **get_quantization_kwargs(tuner.model))
            shape = layer_shape(base, key, parent, backend, config.adapts_convolutions)
            owns_base = isinstance(tuner, TensorModel) and not isinstance(target, BaseTunerLayer)
            layer_cls = classes.convolution if is_convolution(base) else classes.layer
            layer = layer_cls(target, shape, key, backend, owns_base).train(target.training)
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


def _own_key_of(model: nn.Module, key: str) -> str:
    """The name of a layer in the model: PeftMixedModel adds its second adapter from its own root."""
    try:
        model.get_submodule(key)
    except AttributeError:
        return key.removeprefix("base_model.model.")
    return key


def _plan(
    tuner: BaseTuner,
    classes: MethodClasses,
    config: TensorConfig,
    adapter_name: str,
    key: str,
    prefix: str = "",  # with which PEFT matches names
) -> dict[str, AbstractUpdate]:
    """The updates of a new adapter that have no layer yet, that of the layer `key` being one of them."""
    planned: tuple[Any, dict[str, AbstractUpdate]] | None = getattr(tuner, "_planned", None)
    if planned is None or planned[0] is not config or key not in planned[1]:
        if (shapes := shapes_to_load()) is not None:
            _check_shapes(tuner, classes, config, shapes, prefix)
        planned = (config, dict(build_updates(tuner, config, prefix)))
        if shapes is None:
            copy_frames(tuner, config, adapter_name, planned[1])
        tuner._planned = planned  # type: ignore[assignment]
    return planned[1]


def _check_shapes(
    tuner: BaseTuner,
    classes: MethodClasses,
    config: TensorConfig,
    shapes: dict[str, Tensor],
    prefix: str,  # as in `_plan`
) -> None:
    """Raise a `ValueError` unless a checkpoint's tensors are those of this adapter. Allocates nothing."""
    sites, bases = bases_of(tuner, config, prefix)
    config.settle(sites, bases)
    with torch.device("meta"):
        updates = config.build(sites, replace(bases, allocates_only=True))
        settle_order(config, sites, updates)
        take_frames(updates, config, {})
    attribute = classes.layer.adapter_layer_names[0]
    modules: dict[str, nn.Module] = {f"{name}.{attribute}.": update for name, update in updates.items()}
    shared = [update.shared for update in updates.values() if update.shared is not None]
    if shared:
        place = _place_of_owner(tuner.model, classes)
        modules[f"{place}.{attribute}."] = shared[0]
        shapes = _with_owner_in_place(place, classes, shapes)
    check_tensors(modules, {own_key(key): tensor for key, tensor in shapes.items()}, config)


def _name_of_owner(classes: MethodClasses) -> str:
    # Not under the method's prefix: PEFT's delete_adapter passes over names that contain it.
    return f"shared_{classes.layer.adapter_layer_names[0].removesuffix('_update')}"


def _place_of_owner(model: nn.Module, classes: MethodClasses) -> str:
    """Its full name."""
    return f"{home_of_shared(model)}.{_name_of_owner(classes)}".removeprefix(".")


def _with_owner_in_place(
    place: str,  # the owner's full name; "": there is none
    classes: MethodClasses,
    state_dict: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names that they have now: an older one names the owner as the model's own child."""
    older = f"{_name_of_owner(classes)}."
    renamed = {}
    for key, tensor in state_dict.items():
        own = own_key(key)
        prefix = key.removesuffix(own)
        renamed[f"{prefix}{place}.{own.removeprefix(older)}" if place and own.startswith(older) else key] = tensor
    return renamed


def _owner_of_shared(model: nn.Module, layer: TensorLayer, classes: MethodClasses) -> SharedHolder:
    """The owner of what the layers of a method share, made at first use."""
    name, home = _name_of_owner(classes), model.get_submodule(home_of_shared(model))
    if not hasattr(home, name):
        owner = classes.shared(layer)
        owner._active_adapter = layer._active_adapter
        home.add_module(name, owner)
    return getattr(home, name)


def _encoder_modules(model: nn.Module) -> set[nn.Module]:
    """All modules of an encoder-decoder's encoder; empty for other models (their `get_encoder` returns themselves)."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None  # type: ignore[operator]
    return set() if encoder is None or encoder is model else set(encoder.modules())


def _pass_names(adapter_names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": adapter_names}
