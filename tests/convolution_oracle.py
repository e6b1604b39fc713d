"""FLoRA on convolutions by its written formula: one dense einsum, torch's convolution, the border padded by hand."""

import string
from collections.abc import Mapping
from itertools import count
from math import prod
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["convolve", "dense_update", "num_parameters"]

Array: TypeAlias = Any  # of numpy, or of torch where gradients are wanted


def dense_update(  # (out, in / groups, *kernel)
    tensors: Mapping[str, Array],  # U (out, r), V (in / groups, r), G (r, r, r1, ...), K1 (kernel1, r1), ...
    r: int,
    alpha: float,
    xp: ModuleType = np,
) -> Array:
    """`(alpha / r) Σ_pqab U[o,p] G[p,q,a,b] V[i,q] K1[x,a] K2[y,b]`, with as many K as the kernel has axes."""
    kernels = [tensors[f"K{k}"] for k in range(1, next(k for k in count(1) if f"K{k}" not in tensors))]
    bonds, axes = string.ascii_lowercase[: len(kernels)], "xyz"[: len(kernels)]
    pairs = "".join(f",{axis}{bond}" for axis, bond in zip(axes, bonds))
    return (
        alpha / r * xp.einsum(f"op,pq{bonds},iq{pairs}->oi{axes}", tensors["U"], tensors["G"], tensors["V"], *kernels)
    )


def num_parameters(out: int, in_of_group: int, kernel: tuple[int, ...], r: int) -> int:
    ranks = [min(r, size) for size in kernel]
    return r * out + r * in_of_group + r * r * prod(ranks) + sum(map(int.__mul__, kernel, ranks))


def convolve(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `layer` would compute with another weight."""
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim]
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, borders(layer, weight.shape[2:]), mode=layer.padding_mode), 0
    return function(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def borders(layer: nn.Module, kernel: tuple[int, ...]) -> list[int]:
    """What is added left and right of every axis, the last axis first; an odd one out goes to the right."""
    if layer.padding == "valid":
        sides = [(0, 0) for _ in kernel]
    elif layer.padding == "same":
        totals = [dilation * (size - 1) for dilation, size in zip(layer.dilation, kernel)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(amount, amount) for amount in layer.padding]
    return [amount for pair in reversed(sides) for amount in pair]
