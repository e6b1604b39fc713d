"""LoRETTA's adapter by its written formula, dense, put behind the layers of a plain base model with hooks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from own_factor_oracles import numbered, train_matrix

__all__ = ["addition", "behind", "bonds", "matrices"]


def matrices(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:  # (width, size), (size, width)
    """A and B. The trains' entries, row-major, are Aᵀ and Bᵀ."""
    (width,), (size,) = tensors["down_bias"].shape, tensors["up_bias"].shape
    down, up = ([tensors[name] for name in numbered(tensors, side)] for side in ("down", "up"))
    return train_matrix(down, size, torch).T, train_matrix(up, width, torch).T


def addition(z: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:  # (*, size) -> (*, size)
    """`B relu(A z + a) + b`."""
    down, up = matrices(tensors)
    hidden = (torch.einsum("hs,...s->...h", down, z) + tensors["down_bias"]).clamp_min(0)
    return torch.einsum("sh,...h->...s", up, hidden) + tensors["up_bias"]


@contextmanager
def behind(base: nn.Module, *adapters: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterator[nn.Module]:
    """`base` with bottlenecks behind its layers, {layer: tensors} each. All at one layer read the same z."""

    def hook(layer: str):
        return lambda _module, _inputs, z: z + sum(addition(z, tensors[layer]) for tensors in adapters)

    handles = [base.get_submodule(name).register_forward_hook(hook(name)) for name in adapters[0]]
    yield base
    for handle in handles:
        handle.remove()


def bonds(modes: list[int], largest: int) -> list[int]:
    """Those of a train: none above the products of the modes on either side of it."""
    products = [1]
    for mode in modes:
        products.append(products[-1] * mode)
    return [min(largest, left, products[-1] // left) for left in products]
