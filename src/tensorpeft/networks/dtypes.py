"""In which dtype something is computed.

Autocast is asked for only on devices that have it: on others, such as "meta", torch raises.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with `x` runs: autocast's where it is on, otherwise x's own."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products run in the dtype of what they are given."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # most of the time; entering autocast takes as long as a product of small cores


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if it is in float32 or float64, otherwise in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
