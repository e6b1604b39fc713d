"""Is this checkpoint for this model? Asked of the whole adapter before its first tensor is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from tensorpeft.plugin.base_weight import is_allocated, oriented, restore_row_order
from tensorpeft.plugin.layer import TensorLayer


def check_state_dict(tuner: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """A tuner's `load_state_dict` pre-hook.

    Raises:
        ValueError: a tensor has another shape than the adapter it is loaded into, or an update's tensors are there only
            in part. An adapter that was made for this checkpoint (`PeftModel.from_pretrained`,
            `load_adapter`) is taken out of the model again.
    """
    for name, layer in tuner.named_modules():
        if not isinstance(layer, TensorLayer):
            continue
        attribute = layer.adapter_layer_names[0]
        for adapter_name, update in layer.updates.items():
            stem = f"{prefix}{name}.{attribute}.{adapter_name}."
            expected = update.state_dict()
            found = {key: state_dict[stem + key] for key in expected if stem + key in state_dict}
            problem = _misfit(expected, found)
            if problem:
                _remove(tuner, adapter_name)
                raise ValueError(f"{name.removeprefix('model.')}: {problem}")


def _misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """What is wrong with one update's part of a checkpoint; None if nothing is, or if it has none."""
    if not found:
        return None
    missing = sorted(set(expected) - set(found))
    if missing:
        return (
            f"the checkpoint has {sorted(found)} but not {missing} for this layer: it is incomplete, or was made with "
            "another configuration. Save the adapter again."
        )
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            return (
                f"{key} is {tuple(tensor.shape)} in the checkpoint, expected {tuple(expected[key].shape)} for this model "
                "and configuration. Load it on the model it was trained on (base_model_name_or_path in "
                "adapter_config.json), with the r, num_cores and modes it was trained with."
            )
    return None


def _remove(tuner: nn.Module, adapter_name: str) -> None:
    """Take an adapter that was created for a refused checkpoint out of the model again."""
    if not isinstance(tuner, BaseTuner):
        return
    if not getattr(tuner.peft_config[adapter_name], "is_from_checkpoint", False):
        return
    if len(tuner.peft_config) == 1:
        tuner.unload()
    else:
        tuner.delete_adapter(adapter_name)
