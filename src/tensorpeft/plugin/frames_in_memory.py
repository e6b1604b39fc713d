"""The frames of files that adapters in memory have: one copy of each, on a device and in a dtype, for the next one."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

# By their file's SHA-256, their name there, device and dtype.
_frames: WeakValueDictionary[tuple[bytes, str, torch.device, torch.dtype], Tensor] = WeakValueDictionary()


def remember(digest: bytes, name: str, frame: Tensor) -> None:
    """From now on this is the copy of a file's frame where it is."""
    _frames[digest, name, frame.device, frame.dtype] = frame


def in_common(digest: bytes, name: str, frame: Tensor, device: torch.device) -> Tensor:
    """The one copy of a file's frame on a device that adapters share."""
    known = _frames.get((digest, name, device, frame.dtype))
    if known is None or (known.device, known.dtype) != (device, frame.dtype) or known.is_inference():
        known = frame.to(device)
        remember(digest, name, known)
    return known


def follow(before: Tensor, now: Tensor) -> None:
    """Remember where a frame has gone, if it is one of a file's, and is still that."""
    if now is before or now.is_meta or now.dtype != before.dtype:  # a cast may have rounded it
        return
    for (digest, name, *_), frame in list(_frames.items()):
        if frame is before and torch.equal(before, now.to(before.device)):
            remember(digest, name, now)
