"""Has a tensor changed since something was computed from it?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Value = TypeVar("Value")


def version_of(tensors: Iterable[Tensor | None]) -> tuple[object, ...] | None:
    """A key that changes when any of the tensors is replaced or written in place; None where torch keeps no count."""
    tensors = tuple(tensors)
    if any(tensor is not None and tensor.is_inference() for tensor in tensors):
        return None
    return tuple(
        None if tensor is None else (_address(tensor), tensor._version, tensor.dtype, tensor.device)
        for tensor in tensors
    )


def _address(tensor: Tensor) -> int:
    return id(tensor) if isinstance(tensor, FakeTensor) else tensor.data_ptr()  # what is fake lies nowhere


class Kept(Generic[Value]):
    """What was computed from some tensors, until one of them changes."""

    def __init__(self) -> None:
        self._entry: tuple[object, Value] | None = None

    def get(self, make: Callable[[], Value], tensors: Iterable[Tensor | None], *more: object) -> Value:
        """The value of these tensors (and of whatever else it depends on), made anew unless it is the one kept."""
        version = version_of(tensors)
        if version is None:
            self._entry = None
            return make()
        key = (version, more)
        if self._entry is None or self._entry[0] != key:
            self._entry = None  # free the old one first
            self._entry = (key, make())
        return self._entry[1]

    def clear(self) -> None:
        """Keep nothing."""
        self._entry = None
