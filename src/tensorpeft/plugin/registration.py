"""How a method becomes one of PEFT's: a member of its enum, a tuner, a layer. All patches of PEFT stand here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, Union

import peft.tuners.mixed
import peft.tuners.mixed.model as mixed_model
from peft import PeftMixedModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from transformers.integrations.peft import PeftAdapterMixin

from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.experts import ExpertsLayer
from tensorpeft.plugin.guards import guarded_load, guarded_load_of_transformers, guarded_save, hinting_card
from tensorpeft.plugin.holder import SharedHolder, UpdateHolder
from tensorpeft.plugin.layer import TensorLayer
from tensorpeft.plugin.loading import key_of
from tensorpeft.plugin.tuner import MethodClasses, TensorModel, wrap_layer
from tensorpeft.plugin.unloading import merging, unloading

ConfigClass = TypeVar("ConfigClass", bound=type[TensorConfig])


def register(name: str) -> Callable[[ConfigClass], ConfigClass]:
    """A class decorator that makes a configuration a PEFT method called `name`.

    Its tuner and layer classes are the shared ones under the method's name, with the prefix `name_` that PEFT and
    transformers derive from it.

    Raises:
        RuntimeError: PEFT, or another package, has a method of that name already.
    """

    def decorate(config_cls: ConfigClass) -> ConfigClass:
        peft_type = _add_peft_type(name.upper())
        registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
        if registered is not None:
            raise RuntimeError(
                f"cannot register the method {name!r}: PEFT knows one of that name ({registered.__module__}."
                f"{registered.__qualname__}). Uninstall the package that brings it, or use one of the two per process."
            )
        config_cls.registered_type = peft_type
        title = name.capitalize()
        holder_cls = _subclass((UpdateHolder,), f"{title}Holder", config_cls, adapter_layer_names=(f"{name}_update",))
        classes = MethodClasses(
            # "Linear": by that PEFT finds adapted layers where all linear ones are the targets of another adapter.
            layer=_subclass((TensorLayer, holder_cls), f"{title}Linear", config_cls),
            convolution=_subclass((TensorLayer, holder_cls), f"{title}Convolution", config_cls),
            shared=_subclass((SharedHolder, holder_cls), f"{title}SharedHolder", config_cls),
            experts=_subclass((ExpertsLayer, holder_cls), f"{title}ExpertsLayer", config_cls),
        )
        fields = {
            "prefix": f"{name}_",
            "tuner_layer_cls": holder_cls,
            "target_module_mapping": config_cls.default_targets,
            "classes": classes,
        }
        model_cls = _subclass((TensorModel,), f"{title}Model", config_cls, **fields)
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=True)
        # Longer than the prefix, which may be a part of a module's own name ("artifact_").
        _admit_to_mixed_models(peft_type, config_cls, holder_cls, classes, f"{name}_update")
        return config_cls

    return decorate


def _subclass(bases: tuple[type, ...], name: str, config_cls: type, **fields: Any) -> type:
    """A subclass in the method's own module, where pickle (torch.save of a whole model) finds it by name."""
    module = config_cls.__module__
    doc = f"{bases[0].__name__} of the method that `{config_cls.__name__}` configures."
    cls = type(name, bases, {**fields, "__module__": module, "__doc__": doc})
    setattr(sys.modules[module], name, cls)
    return cls


def _add_peft_type(name: str) -> PeftType:
    """PEFT takes only names in its enum, so a plug-in must extend it. Works with pickle, deepcopy and json."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    assert PeftType(name) is member
    return member


_module_prefixes = tuners_utils._get_tuner_state_dict_key_prefixes


def _key_prefixes(model: Any, adapter_name: str | None = None) -> set[str]:
    """PEFT looks in a state dict for the names of modules; where layers are checkpointed, saves an empty adapter."""
    return {key_of(prefix) for prefix in _module_prefixes(model, adapter_name)}


# Until PEFT knows torch's wrapper, for LoRA too.
tuners_utils._get_tuner_state_dict_key_prefixes = _key_prefixes

PeftModel.load_adapter = guarded_load(PeftModel.load_adapter)  # type: ignore[method-assign]
PeftModel.create_or_update_model_card = hinting_card(PeftModel.create_or_update_model_card)  # type: ignore[method-assign]
PeftModel.save_pretrained = guarded_save(PeftModel.save_pretrained)  # type: ignore[method-assign]
PeftAdapterMixin.load_adapter = guarded_load_of_transformers(PeftAdapterMixin.load_adapter)  # type: ignore
for _cls in (PeftModel, PeftMixedModel):
    _from_pretrained: Any = _cls.from_pretrained
    _cls.from_pretrained = classmethod(guarded_load(_from_pretrained.__func__))  # type: ignore[method-assign,assignment]

# The methods that PeftMixedModel can hold, by the type in their configurations.
_mixed_classes: dict[PeftType, MethodClasses] = {}
_create_in_mixed_model = mixed_model.MixedModel._create_and_replace
_unload_mixed_model = mixed_model.MixedModel._unload_and_optionally_merge
_prepare_mixed_config = mixed_model.MixedModel._prepare_adapter_config


def _create_with_our_layers(self: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """PeftMixedModel has a fixed dispatch. Until it asks PEFT's registry."""
    if isinstance(config, TensorConfig):
        wrap_layer(self, _mixed_classes[config.registered_type], config, adapter_name, kwargs["current_key"])
    else:
        _create_in_mixed_model(self, config, adapter_name, *args, **kwargs)


def _unload_all_or_none(
    self: Any,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> Any:
    """PeftMixedModel's unload hands back a model with the layers of all methods replaced; ours have more to remove."""
    with unloading(self, merge, adapter_names, safe_merge):
        return _unload_mixed_model(self, merge, progressbar, safe_merge, adapter_names)


def _merge_all_or_none(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """PeftMixedModel's merge_adapter stops at the first layer that cannot be merged."""
    with merging(self.model, adapter_names, safe_merge):
        BaseTuner.merge_adapter(self, adapter_names=adapter_names, safe_merge=safe_merge)


def _prepare_with_our_defaults(config: Any, model_config: dict[str, Any]) -> Any:
    """PeftMixedModel takes LoRA's default targets for every method."""
    if isinstance(config, TensorConfig) and config.target_parameters:
        raise ValueError(
            f"target_parameters={config.target_parameters!r}: a PeftMixedModel adapts layers alone. Use a PeftModel "
            "(get_peft_model without mixed=True), or leave the experts out."
        )
    if isinstance(config, TensorConfig) and config.target_modules is None:
        targets = config.default_targets.get(model_config.get("model_type", ""))
        if targets is None:
            raise ValueError("Please specify `target_modules` in `peft_config`")  # as PEFT says it
        config.target_modules = set(targets)  # type: ignore[assignment]
    return _prepare_mixed_config(config, model_config)


mixed_model.MixedModel._create_and_replace = _create_with_our_layers  # type: ignore[method-assign]
mixed_model.MixedModel._unload_and_optionally_merge = _unload_all_or_none  # type: ignore[method-assign]
mixed_model.MixedModel.merge_adapter = _merge_all_or_none  # type: ignore[method-assign]
mixed_model.MixedModel._prepare_adapter_config = staticmethod(_prepare_with_our_defaults)  # type: ignore[method-assign]


def _admit_to_mixed_models(
    peft_type: PeftType, config_cls: type, holder_cls: type, classes: MethodClasses, prefix: str
) -> None:
    """PeftMixedModel has fixed lists of what it can hold. Until it asks PEFT's registry."""
    types = (*mixed_model.COMPATIBLE_TUNER_TYPES, peft_type)
    mixed_model.COMPATIBLE_TUNER_TYPES = peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = types
    mixed_model.Configs = Union[mixed_model.Configs, config_cls]  # noqa: UP007  # of classes known at run time
    mixed_model.Layers = (*mixed_model.Layers, holder_cls)
    mixed_model.PREFIXES.append(prefix)
    _mixed_classes[peft_type] = classes
