"""Adapters that have frames: those of our own methods that say so, and PEFT's LoRA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any, ClassVar

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from tensorpeft.networks.sketch import Gradient, leading_columns
from tensorpeft.networks.update import AbstractLowRankUpdate
from tensorpeft.plugin.config import FramedConfig
from tensorpeft.plugin.holder import SharedHolder
from tensorpeft.plugin.layer import TensorLayer


class Framed(ABC):
    """An adapter with frames, and its layers.

    Args:
        config: its configuration.
        adapter_name: its name.
    """

    layer_type: ClassVar[type[nn.Module]]  # of its linear layers
    holds: ClassVar[str]  # what a layer that has an adapter holds by its name

    def __init__(self, config: Any, adapter_name: str):
        self.config = config
        self.adapter_name = adapter_name

    def layers(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """The layers that have it, by their full names."""
        for name, layer in model.named_modules():
            if not isinstance(layer, SharedHolder) and self.adapter_name in getattr(layer, self.holds, {}):
                yield name, layer

    @abstractmethod
    def rank(
        self,
        shapes: Mapping[str, tuple[int, int]],  # (out, in) by layer
    ) -> int:
        """Of how many leading singular vectors of every weight's gradient it makes something."""

    @abstractmethod
    def adds_nothing(self, layer: Any) -> bool:
        """Whether its update at a layer is zero, as it starts."""

    @abstractmethod
    def modules_of(self, layer: Any) -> list[nn.Module]:
        """Those whose tensors are frames or stand between them."""

    @abstractmethod
    def set_frames(
        self,
        layers: Mapping[str, Any],
        gradients: Mapping[str, Gradient],  # of the same layers
        record: dict[str, int],  # what they are from
    ) -> None:
        """Set the frames where the gradients' energy is, so that every update stays zero."""


class FramedTensors(Framed):
    """One of ours."""

    layer_type = TensorLayer
    holds = "updates"

    def rank(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """As its method says."""
        return self.config.frame_rank(shapes)

    def adds_nothing(self, layer: Any) -> bool:
        """One of the three factors is zero."""
        update = layer.updates[self.adapter_name]
        assert isinstance(update, AbstractLowRankUpdate)
        with torch.no_grad():
            return not all(factor.any() for factor in update.factors())

    def modules_of(self, layer: Any) -> list[nn.Module]:
        """The update, and the factors that it shares."""
        update = layer.updates[self.adapter_name]
        return [update] if update.shared is None else [update, update.shared]

    @torch.no_grad()
    def set_frames(self, layers: Mapping[str, Any], gradients: Mapping[str, Gradient], record: dict[str, int]) -> None:
        """As its method does; layers of one tensor may be on several devices."""
        updates = {name: layer.updates[self.adapter_name] for name, layer in layers.items()}
        moved = dict(gradients)
        for name, update in updates.items():
            if update.shared is not None:
                device = next(update.shared.parameters()).device
                moved[name] = Gradient(*(part.to(device) for part in moved[name]))
        self.config.set_frames(updates, moved)
        self.config.gradient_start = record


class FramedLora(Framed):
    """PEFT's LoRA."""

    layer_type = LoraLinear
    holds = "lora_A"

    def rank(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """R."""
        return self.config.r

    def adds_nothing(self, layer: Any) -> bool:
        """B is zero."""
        return not layer.lora_B[self.adapter_name].weight.any()

    def modules_of(self, layer: Any) -> list[nn.Module]:
        """A."""
        return [layer.lora_A[self.adapter_name]]

    @torch.no_grad()
    def set_frames(self, layers: Mapping[str, Any], gradients: Mapping[str, Gradient], record: dict[str, int]) -> None:
        """A's rows: the leading right singular vectors, as long as the rows of its usual start are in the mean."""
        for name, layer in layers.items():
            down = layer.lora_A[self.adapter_name].weight
            rows = leading_columns([gradients[name].right], len(down)).t() / sqrt(3)
            down[: len(rows)] = rows.to(down)


def framed_of(model: PeftModel, adapter_name: str) -> Framed:
    """The adapter of that name.

    Raises:
        ValueError: there is none, or it has no frames that a gradient could set.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r}: expected one of {sorted(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    if isinstance(config, FramedConfig):
        if config.frames is not None:
            raise ValueError(
                f"{adapter_name}: its frames are kept in {config.frames!r} for all adapters that refer to them. Make "
                "one without frames=, set its frames, and keep those in another folder."
            )
        return FramedTensors(config, adapter_name)
    if config.peft_type == PeftType.LORA:
        return FramedLora(config, adapter_name)
    method = getattr(config.peft_type, "value", config.peft_type)
    raise ValueError(
        f"{adapter_name}: a {method} adapter has no frames that a gradient could set. Methods that have: "
        f"{', '.join(sorted(set(_framed_methods())))}, and PEFT's LoRA."
    )


def _framed_methods() -> Iterator[str]:
    classes = [FramedConfig]
    while classes:
        classes += (kind := classes.pop()).__subclasses__()
        if hasattr(kind, "registered_type"):
            yield kind.registered_type.value.lower()
