"""Has a tensor changed since something was computed from it?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tensorpeft.networks.derivatives import is_transformed
from tensorpeft.networks.dtypes import at_least_float32

Value = TypeVar("Value")


def version_of(tensors: Iterable[Tensor | None]) -> tuple[object, ...] | None:
    """A key that changes when any of the tensors is replaced or written in place; None where torch keeps no count.

    It does not see what is written through `.data`, nor a tensor that has come to lie where a freed one lay.
    """
    tensors = tuple(tensors)
    if any(tensor is not None and tensor.is_inference() for tensor in tensors):
        return None
    return tuple(
        None if tensor is None else (_address(tensor), tensor._version, tensor.dtype, tensor.device)
        for tensor in tensors
    )


def _address(tensor: Tensor) -> int:
    return id(tensor) if isinstance(tensor, FakeTensor) else tensor.data_ptr()  # what is fake lies nowhere


def can_compare(tensor: Tensor) -> bool:
    """Whether its numbers can be compared: they are there, and operations are not only recorded, to run later."""
    if torch.compiler.is_compiling() or is_transformed() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


class Kept(Generic[Value]):
    """What was computed from some small tensors, as long as they hold the same numbers.

    The numbers are compared with a copy of them: averages of weights and older optimisers write through `.data`, which
    torch does not count. On a GPU the comparison waits for what was queued before.
    """

    def __init__(self) -> None:
        self._entry: tuple[object, list[Tensor], Value] | None = None

    @torch.no_grad()
    def get(self, make: Callable[[], Value], tensors: Sequence[Tensor], *more: object) -> Value:
        """The value of these tensors (and of whatever else it depends on), made anew unless it is the one kept."""
        if not can_compare(tensors[0]):
            return make()
        form = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        key = (form, torch.is_inference_mode_enabled(), more)
        numbers = list(tensors)
        if tensors[0].is_cuda:  # where every answer is waited for
            numbers = [torch.cat([at_least_float32(tensor).flatten() for tensor in tensors])]
        entry = self._entry
        if entry is None or entry[0] != key or not all(map(torch.equal, entry[1], numbers)):
            self._entry = None  # free the old one first
            entry = self._entry = (key, [tensor.clone() for tensor in numbers], make())
        return entry[2]

    def clear(self) -> None:
        """Keep nothing."""
        self._entry = None

    def __getstate__(self) -> dict[str, object]:
        """What a copy, or a pickle, is made of: nothing that is kept."""
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        """As new."""
        self._entry = None
