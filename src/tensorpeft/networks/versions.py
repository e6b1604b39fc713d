"""Has a tensor changed since something was computed from it?"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def version_of(tensors: Iterable[Tensor | None]) -> tuple[object, ...] | None:
    """A key that changes when any of the tensors is replaced or written in place; None where torch keeps no count."""
    tensors = tuple(tensors)
    if any(tensor is not None and tensor.is_inference() for tensor in tensors):
        return None
    return tuple(
        None if tensor is None else (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device)
        for tensor in tensors
    )
