"""A module that multiplies by stacks of weights, such as a model's experts: every matrix becomes a layer."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from tensorpeft.networks.effective import effective_weight, trained_weight
from tensorpeft.networks.update import AbstractUpdate, AbstractWeightUpdate
from tensorpeft.networks.versions import Kept, version_of
from tensorpeft.plugin.base_weight import StackedWeight, as_stack, is_gathered
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.holder import UpdateHolder
from tensorpeft.plugin.layer import TensorLayer, compared, needs_gradients
from tensorpeft.plugin.routes import keeps_sums

# What linear layers in experts are called where experts are no parameters, as before transformers 5.
_LAYERS_OF_EXPERTS = frozenset(name for names in _MOE_TARGET_MODULE_MAPPING.values() for name in names)
# One of 8 bits is a weight only together with its scales, which are elsewhere.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Another thread must neither read nor run a module to which this one has lent a parameter.
_lending = RLock()


class ExpertsLayer(UpdateHolder):
    """A module around one with stacked weights, and a layer for each of their matrices: `3.down_proj`.

    Those hold the updates, and merge; nobody calls them. This one holds none: it has the module multiply by `W + Σ ΔW`,
    each matrix of which is `networks.effective.effective_weight`. In eval the sums are kept, as layers keep theirs.

    Args:
        base_layer: the module that holds the parameters (stack, out, in).
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self._kept: dict[str, Kept[Tensor]] = {}  # by parameter

    def split(self, parameter: str) -> None:
        """Make a layer of every matrix of a parameter, if there is none yet. They adapt nothing as yet."""
        if parameter in self._kept:
            return
        self._kept[parameter] = Kept()
        for index in range(len(getattr(self.base_layer, parameter))):
            if not hasattr(self, str(index)):
                self.add_module(str(index), nn.Module())
            setattr(getattr(self, str(index)), parameter, StackedWeight(self.base_layer, parameter, index))

    def is_of(self, config: TensorConfig) -> bool:
        """Whether it is of the configuration's method."""
        return self.adapter_layer_names[0] == f"{config.registered_type.value.lower()}_update"

    def layers(self, parameter: str) -> list[TensorLayer]:
        """The layers of a parameter's matrices."""
        return [getattr(getattr(self, str(k)), parameter) for k in range(len(getattr(self.base_layer, parameter)))]

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """As the module's own.

        Raises:
            ValueError: a mixed batch with an adapter of the experts, or a weight that has been offloaded.
        """
        if adapter_names is not None:
            self._check_unmixed(adapter_names)
            return self.base_layer(*args, **kwargs)
        with nullcontext() if torch.compiler.is_compiling() else _lending:
            sums = {name: self._sum(name) for name in self._kept}
            lent = {name: tensor for name, tensor in sums.items() if tensor is not None}
            return functional_call(self.base_layer, lent, args, kwargs) if lent else self.base_layer(*args, **kwargs)

    def _check_unmixed(self, adapter_names: list[str]) -> None:
        layers = [layer for parameter in self._kept for layer in self.layers(parameter)]
        if merged := sorted({name for layer in layers for name in layer.merged_adapters}):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged are: {', '.join(merged)}."
            )
        adapted = {name for layer in layers for name in layer.updates}
        if mixed := sorted(adapted.intersection(adapter_names)):
            raise ValueError(
                f"Cannot pass `adapter_names` with {', '.join(mixed)}: experts see tokens, not the rows of a batch, so "
                "that rows cannot have an adapter of their own. Run each adapter's rows alone (set_adapter), or train "
                "adapters without target_parameters."
            )

    def _sum(self, parameter: str) -> Tensor | None:
        """What the module is to multiply by, as it stores it; None: by what it has."""
        layers = self.layers(parameter)
        updates: list[list[AbstractWeightUpdate]] = [layer.unmerged_updates() for layer in layers]  # type: ignore[misc]
        if not any(updates):
            if not self.disable_adapters:  # for now
                self._kept[parameter].clear()
            return None
        stored = getattr(self.base_layer, parameter)
        if stored.is_meta and not any(tensor.is_meta for tensor in updates[0][0].parameters()):
            raise ValueError(
                f"{parameter} of a {type(self.base_layer).__name__} has been offloaded, but what an adapter adds to "
                "it needs it in memory: load the model without offloading this module (device_map)."
            )
        active = [update for part in updates for update in part]
        trains = needs_gradients(stored, active)
        if trains or self.training or torch.compiler.is_compiling() or not all(layer.owns_base for layer in layers):
            return self._make(stored, updates, trains)
        if not keeps_sums() or is_gathered(self.base_layer) or (version := version_of([stored])) is None:
            return self._make(stored, updates, False)
        return self._kept[parameter].get(lambda: self._make(stored, updates, False), *compared(stored, active), version)

    def _make(self, stored: Tensor, updates: list[list[AbstractWeightUpdate]], trains: bool) -> Tensor:
        matrices: list[Tensor] = []
        for weight, part in zip(as_stack(self.base_layer, stored).unbind(), updates):
            cuts = [update.cut() for update in part]
            matrices.append(trained_weight(weight, cuts) if trains else effective_weight(weight, cuts, weight.dtype))
        return torch.stack([as_stack(self.base_layer, matrix) for matrix in matrices])

    def _clear(self) -> None:
        for kept in self._kept.values():
            kept.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertsLayer:
        """As torch's; the sums that were kept go."""
        self._clear()
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> ExpertsLayer:
        """As torch's; the sums that were kept go."""
        self._clear()
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the sums that were kept, which may be with this adapter, go."""
        self._clear()
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """The layers merge. The sums that were kept go."""
        self._clear()

    def unmerge(self) -> None:
        """The layers unmerge. The sums that were kept go."""
        self._clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module as it was, or with the adapters in its parameters. PEFT asks for this."""
        for layer in (layer for parameter in self._kept for layer in self.layers(parameter) if merge):
            layer.merge(safe_merge, adapter_names)
        return self.base_layer


@dataclass(frozen=True)
class Stack:
    """A parameter (stack, out, in), or (stack, in, out), of a module.

    Args:
        name: full name of the parameter.
        module: full name of the module.
        owner: the module.
        parameter: the parameter's name there.
    """

    name: str
    module: str
    owner: nn.Module
    parameter: str

    @property
    def tensor(self) -> Tensor:
        """The parameter."""
        return getattr(self.owner, self.parameter)

    def weights(self) -> dict[str, StackedWeight]:
        """Its matrices, by the names that they have as layers: `model.layers.0.mlp.experts.3.down_proj`."""
        stored = range(len(self.tensor))
        return {f"{self.module}.{k}.{self.parameter}": StackedWeight(self.owner, self.parameter, k) for k in stored}

    def split(self, model: nn.Module, layer_cls: type[ExpertsLayer]) -> None:
        """Put an `ExpertsLayer` around the module, if there is none, and make a layer of every matrix."""
        layer = model.get_submodule(self.module)
        if not isinstance(layer, layer_cls):
            assert layer is self.owner  # see `target_stacks`
            layer = layer_cls(self.owner).train(self.owner.training)
            parent, _, name = self.module.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
        layer.split(self.parameter)


def target_stacks(
    model: nn.Module,
    config: TensorConfig,
    is_target: Callable[[TensorConfig, str], Any],  # PEFT's, of the names in target_modules
) -> list[Stack]:
    """What `target_parameters` names, as PEFT matches layers: exclude_modules and layers_to_transform count.

    Raises:
        ValueError: a name that matches nothing, or a parameter that is no stack of matrices.
    """
    if not config.target_parameters:
        return []
    found = list(_find_parameters(model))
    as_modules = copy.copy(config)
    chosen: list[Stack] = []
    for target in config.target_parameters:
        if not any(f".{stack.name}".endswith(f".{target}") for stack in found):
            stacks = sorted({_ending(stack.name) for stack in found if _is_of_experts(stack)})
            raise ValueError(
                f"target_parameters: no parameter of the model is called {target!r}; its experts' are "
                f"{', '.join(stacks) or 'none'}. Layers are named in target_modules."
            )
    as_modules.target_modules = list(config.target_parameters)
    for stack in found:
        matches = [is_target(as_modules, name) for name in (stack.name, stack.module)]  # either can be excluded
        if matches[0] and not any(isinstance(match, _ExcludedModule) for match in matches):
            _check_stack(model, stack, config)
            chosen.append(stack)
    return chosen


def _check_stack(model: nn.Module, stack: Stack, config: TensorConfig) -> None:
    tensor = stack.tensor
    plain = type(tensor) in (Tensor, nn.Parameter, FakeTensor) and tensor.dtype in _DTYPES
    if tensor.ndim != 3 or not plain or isinstance(stack.owner, _ConvNd) or not stack.module:
        raise ValueError(
            f"target_parameters: {stack.name} is a {type(tensor).__name__} {tuple(tensor.shape)} of {tensor.dtype} in "
            f"a {type(stack.owner).__name__}, expected a plain parameter (experts, out, in) in full or half precision, "
            "such as experts.gate_up_proj. The weight of a layer is adapted with target_modules."
        )
    layer = model.get_submodule(stack.module)
    is_ours = isinstance(layer, ExpertsLayer) and layer.is_of(config)
    if layer is not stack.owner and not is_ours:
        raise ValueError(
            f"target_parameters: {stack.module} is wrapped by another adapter ({type(layer).__name__}) already. Merge "
            "or unload that one first."
        )


def check_stacked_updates(
    updates: Mapping[str, AbstractUpdate], bases: Mapping[str, tuple[nn.Module, Any]], config: TensorConfig
) -> None:
    """Raise a `ValueError` if one of these updates is behind a layer, where there is only a weight."""
    for name, update in updates.items():
        if isinstance(bases[name][0], StackedWeight) and not isinstance(update, AbstractWeightUpdate):
            raise ValueError(
                f"{name}: {type(config).__name__} puts a network behind a layer, but an expert that is a part of a "
                "parameter is no layer. Leave target_parameters out, or use a method that updates weights."
            )


def warn_of_stacks(model: nn.Module, config: TensorConfig) -> None:
    """Warn of experts left out that are no layers, where "all-linear" or names of layers that they had are targets."""
    modules = config.target_modules
    if isinstance(modules, str):
        named = ['"all-linear"'] if modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND else []
    else:
        named = sorted(name for name in modules or () if name.rpartition(".")[2] in _LAYERS_OF_EXPERTS)
    if not named:
        return
    targets = tuple(f".{target}" for target in config.target_parameters or ())
    stacks = [stack for stack in _find_parameters(model) if _is_of_experts(stack)]
    left = [stack for stack in stacks if not f".{stack.name}".endswith(targets)] if targets else stacks
    if left:
        endings = list(dict.fromkeys(_ending(stack.name) for stack in left))
        warnings.warn(
            f"target_modules={', '.join(named)} adapts linear layers, which leaves out {len(left)} parameters of "
            f"experts with {sum(stack.tensor.numel() for stack in left):,} numbers: {', '.join(endings)}. Adapt them "
            f"too with target_parameters={endings}, or pass the names of layers alone.",
            UserWarning,
            stacklevel=2,
        )


def _is_of_experts(stack: Stack) -> bool:
    is_named = hasattr(stack.owner, "num_experts") or "expert" in type(stack.owner).__name__.lower()
    return stack.tensor.ndim == 3 and is_named and not isinstance(stack.owner, _ConvNd)


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _find_parameters(model: nn.Module) -> Iterator[Stack]:
    """The parameters of the base model's modules, by the names that they have there."""
    around: list[str] = []  # the adapted layers that a module is in
    for name, module in model.named_modules():
        while around and not name.startswith(around[-1]):
            around.pop()
        if around and not f"{name}.".startswith(f"{around[-1]}base_layer."):
            continue  # an adapter's own
        shown = re.sub(r"(\.base_layer)+\.", ".", f"{name}.")
        for parameter, _ in module.named_parameters(recurse=False):
            yield Stack(f"{shown}{parameter}".removeprefix("."), shown.removesuffix("."), module, parameter)
        if isinstance(module, BaseTunerLayer):
            around.append(f"{name}.")
