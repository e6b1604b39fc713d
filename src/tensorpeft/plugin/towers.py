"""The parts of a composite model, each with a configuration of its own: text and vision towers, encoder and decoder."""

from __future__ import annotations

from typing import Any

from torch import nn


def find_tower(
    model: nn.Module,
    name: str,  # full name of a layer in it, or of a part of one
) -> tuple[str, Any]:  # full name of the tower, configuration
    """The innermost part of a model that a layer is in and that has another kind of configuration than what is around
    it ("": the model as a whole), and the configuration of the nearest module around the layer that has one.

    The layers of one list are never towers.
    """
    tower, config, of_tower = "", _config_of(model), _config_of(model)
    module: Any = model
    parts, start = name.split("."), 0
    for end, part in enumerate(parts, 1):
        if (module := getattr(module, part, None)) is None:  # an expert that is a part of a parameter
            break
        if (found := _config_of(module)) is None:
            continue
        config = found
        is_in_list = of_tower is not None and any(part.isdigit() for part in parts[start:end])
        if type(found) is not type(of_tower) and not is_in_list:
            tower, of_tower, start = ".".join(parts[:end]), found, end
    return tower, config


def _config_of(module: nn.Module) -> Any:
    """A module's own configuration, of the kind that transformers' models have; else None."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "model_type") else None
