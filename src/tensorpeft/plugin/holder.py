"""What holds an adapter's tensors in a model: every adapted layer, and the one owner of what the layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tensorpeft.plugin.base_weight import onloaded, put_weight
from tensorpeft.plugin.frames_in_memory import follow


class UpdateHolder(nn.Module, BaseTunerLayer):
    """A module with something of every adapter.

    Each method has a subclass made by `plugin.registration`, whose `adapter_layer_names` holds the one attribute that
    PEFT's checkpoint keys name (`dota_update`): a `ModuleDict` by adapter.
    """

    # What `peft.helpers.disable_input_dtype_casting` turns off: we cast an adapter's numbers to x's dtype, never x.
    cast_input_dtype_enabled = True

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def updates(self) -> nn.ModuleDict:
        """What it holds, by adapter name."""
        return getattr(self, self.adapter_layer_names[0])

    def hold(self, adapter_name: str, tensors: nn.Module, inference_mode: bool = False) -> None:
        """Add (or replace) what is held of an adapter."""
        self.updates[adapter_name] = tensors.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UpdateHolder:
        """As torch's; a frame that several adapters have in common is one afterwards too, and that of the next one."""
        before = [(m._buffers, key, buffer) for m in self.updates.modules() for key, buffer in m._buffers.items()]
        super()._apply(fn, recurse)
        moved: dict[int, Tensor] = {}
        for buffers, key, buffer in before:
            now = buffers[key]
            if buffer is not None and now is not None:
                if (common := moved.setdefault(id(buffer), now)) is now:
                    follow(buffer, now)
                buffers[key] = common
        return self

    def set_base_weight(self, weight_data: Tensor) -> None:
        """As PEFT's; a weight that was loaded, or not, under `torch.inference_mode` stays one of that kind."""
        is_inference = self.get_base_layer().weight.is_inference()  # type: ignore[union-attr]
        if weight_data.is_inference() != is_inference:
            # A parameter of one kind whose data are of the other cannot be used.
            with torch.inference_mode(is_inference):
                weight_data = weight_data.clone()
        if self.quantization_backend is not None:
            super().set_base_weight(weight_data)
        else:
            put_weight(self.get_base_layer(), weight_data)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but the tensors keep their dtype: small steps would be lost in a half-precision copy."""
        if adapter_name not in self.updates:
            return
        tensors = self.updates[adapter_name]
        if device is None:
            with onloaded(base := self.get_base_layer()):
                device, _ = self._get_base_layer_device_and_dtype(base)
        is_meta = device is None or device.type == "meta" or any(tensor.is_meta for tensor in tensors.parameters())
        if not is_meta:  # to or from where there is no data
            tensors.to(device)


class SharedHolder(UpdateHolder):
    """Factors that all layers of an adapter share, as one of the model's own modules.

    PEFT saves, loads, freezes, activates, casts and deletes what belongs to a `BaseTunerLayer` in the model. So this
    is one, without a base layer: what is shared is handled as a layer's own updates are, and stored once.

    It stands in the model itself (`home_of_shared`), as FSDP gathers what the outermost unit has for the whole forward.

    Args:
        anchor: a layer on whose device the factors are.
    """

    anchor: nn.Module

    def __init__(self, anchor: nn.Module):
        super().__init__()
        object.__setattr__(self, "anchor", anchor)  # a plain reference: the layer is registered in its own place
        # PEFT expects every tuner layer to have them; these are one layer's, other layers may differ.
        self.in_features, self.out_features = anchor.in_features, anchor.out_features

    def get_base_layer(self) -> nn.Module:
        """The innermost layer of the anchor."""
        return self.anchor.get_base_layer() if isinstance(self.anchor, BaseTunerLayer) else self.anchor

    def _get_available_adapters(self) -> set[str]:
        """None: the layers have them. PEFT's `get_model_status` takes one that is here for one that is not merged."""
        return set()

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x: a model that walks its children passes through it."""
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the layers merge."""

    def unmerge(self) -> None:
        """Nothing: the layers unmerge."""


def home_of_shared(model: nn.Module) -> str:
    """Full name of the module in which a model's `SharedHolder` stands: "", the model itself.

    In a container, which walks, counts or saves its children, it is the first module inside that is none and has no
    weight, so that no adapter takes its place. Without such a module it is the container. The adapters that are there
    make no difference: checkpoints name it.
    """
    if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
        return f"_orig_mod.{home_of_shared(compiled)}".removesuffix(".")
    if not _is_container(model):
        return ""
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(wrapped) and wrapped:
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wrapped += (f"{name}.",)
        elif not _is_container(module) and "weight" not in module._parameters:
            return name
    return ""


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
