"""In which dtype something is computed."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with `x` runs: autocast's where it is on, but for float64; otherwise x's own."""
    casts = x.dtype != torch.float64 and _autocasts(x.device)
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products run in the dtype of what they are given."""
    if _autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # most of the time; entering autocast takes as long as a product of small cores


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if it is in float32 or float64, otherwise in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each `at_least_float32`."""
    return {name: at_least_float32(tensor) for name, tensor in tensors.items()}


def _autocasts(device: torch.device) -> bool:
    """Whether autocast is on. "meta" has none, and torch raises if asked.

    Not by `torch.amp.is_autocast_available`, at which the compiler of torch 2.11 breaks the graph.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
