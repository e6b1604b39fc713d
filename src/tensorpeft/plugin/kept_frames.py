"""Frozen frames that many adapters of one model have in common: kept once, in a file of their own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tensorpeft.networks.update import AbstractUpdate
from tensorpeft.plugin.config import FramedConfig
from tensorpeft.plugin.layer import TensorLayer
from tensorpeft.plugin.loading import key_of, own_key

FRAMES_NAME = "frames.safetensors"
# Those that an adapter in memory has, by the digest of their file, name and device: the next adapter takes the same.
_in_memory: WeakValueDictionary[tuple[str, str, torch.device], Tensor] = WeakValueDictionary()


def save_frames(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Keep an adapter's frozen frames in a file of their own, which other adapters of the model share.

    The folder gets `frames.safetensors`. This adapter and every one that is made with `frames=folder` are then saved
    without frames, loaded from it with the same ones, and hold one copy of them together in memory. What is saved names
    the folder as it is given here, and the file's SHA-256, so that an adapter never meets other frames than its own.

    Args:
        model: the result of `get_peft_model`, or a model with injected adapters.
        folder: where to; made if need be. A relative one counts from where a program runs; one that was uploaded to
            the Hub is found by its name there, if `frames` in adapter_config.json says so.
        adapter_name: of an adapter that does not train its frames.

    Raises:
        FileExistsError: the folder holds other frames, which adapters may refer to.
        ValueError: no such adapter, or one that trains its frames, or has none.

    Source: the "extremely cheap" training of arXiv 2402.01376's abstract: only what is between the frames is new.

    >>> import tempfile, torch, transformers
    >>> from peft import get_peft_model
    >>> from tensorpeft import LotrConfig
    >>> sizes = dict(vocab_size=96, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4)
    >>> base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    >>> settings = dict(r=4, train="cores", target_modules=["q_proj", "v_proj"])
    >>> model = get_peft_model(base, LotrConfig(**settings))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_frames(model, folder)
    ...     model.add_adapter("second", LotrConfig(**settings, frames=folder))
    >>> [name for name in model.state_dict() if "update.second" in name]
    ['base_model.model.shared_lotr.lotr_update.second.24x24_G']
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, FramedConfig) or not config.freezes_frames():
        found = f"one of {sorted(configs)}" if config is None else "an adapter whose frames are frozen"
        raise ValueError(f"adapter_name={adapter_name!r}: expected {found}; no others have frames to keep.")
    updates: dict[str, Any] = {
        own_key(key_of(name)): layer.updates[adapter_name]
        for name, layer in model.named_modules()
        if isinstance(layer, TensorLayer) and adapter_name in layer.updates
    }
    places = _places(updates)
    tensors = {name: getattr(module, key).detach().cpu().contiguous() for name, (module, key) in places.items()}
    config.frames_digest = digest = _write(tensors, Path(folder))
    config.frames = os.fspath(folder)
    for name, (module, key) in places.items():
        frame = getattr(module, key)
        module.register_buffer(key, frame, persistent=False)
        _in_memory[digest, name, frame.device] = frame


def take_frames(
    updates: Mapping[str, AbstractUpdate],  # just built, by the names of their weights
    config: FramedConfig,  # whose `frames` is given; gets the digest of a new adapter's
    devices: Mapping[str, torch.device],  # where the weights are
) -> None:
    """Put the frames of a configuration's file into its updates, whose own tensors they no longer are.

    Of updates on the meta device only the latter.

    Raises:
        ValueError: there is no such file, or it is damaged, or of other frames than this adapter's.
    """
    places = _places(updates)
    kept: dict[str, Tensor] = {name: getattr(module, key) for name, (module, key) in places.items()}
    if not any(frame.is_meta for frame in kept.values()):
        first = next(iter(devices.values()))
        device_of = {name: devices.get(name.rpartition(".")[0], first) for name in places}
        kept = _remembered(config, device_of) or _remember(_read(config, kept), config, device_of)
    for name, (module, key) in places.items():
        module.register_buffer(key, kept[name], persistent=False)


def _places(updates: Mapping[str, AbstractUpdate]) -> dict[str, tuple[nn.Module, str]]:
    """The module of every frame, and its name there, by the name in the file: of one's own, the weight's before it."""
    found = {}
    for name, update in updates.items():
        for module, stem in ((update, f"{name}."), (update.shared, "")):
            found.update({f"{stem}{key}": (module, key) for key in (() if module is None else module._buffers)})
    return found


def _remembered(config: FramedConfig, device_of: Mapping[str, torch.device]) -> dict[str, Tensor] | None:
    """Frames that another adapter has in memory; None: not all of them."""
    found = {name: _in_memory.get((config.frames_digest or "", name, device)) for name, device in device_of.items()}
    frames = {name: frame for name, frame in found.items() if frame is not None}
    return frames if len(frames) == len(found) else None


def _remember(
    frames: Mapping[str, Tensor], config: FramedConfig, device_of: Mapping[str, torch.device]
) -> dict[str, Tensor]:
    """Frames that were read, where their weights are: the same tensors for all adapters of a process."""
    found = {}
    for name, device in device_of.items():
        key = (config.frames_digest or "", name, device)
        found[name] = _in_memory.setdefault(key, frames[name].to(device))
    return found


def _write(frames: Mapping[str, Tensor], folder: Path) -> str:
    """Write the file, unless it is there; its digest."""
    content = save(dict(frames))
    digest, path = hashlib.sha256(content).hexdigest(), folder / FRAMES_NAME
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise FileExistsError(
                f"{path} holds other frames, without which adapters that refer to it are lost. Name another folder."
            )
        return digest
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{FRAMES_NAME}.{os.getpid()}"
    unfinished.write_bytes(content)
    unfinished.replace(path)
    return digest


def _read(config: FramedConfig, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The frames of a configuration's file, in the dtype of those that are expected; a new adapter's digest is set."""
    assert config.frames is not None
    path = Path(config.frames, FRAMES_NAME)
    if not Path(config.frames).exists():
        try:
            path = Path(hf_hub_download(config.frames, FRAMES_NAME))
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"frames={config.frames!r}: expected a folder with {FRAMES_NAME}, as tensorpeft.save_frames leaves it, "
                "or the name of one on the Hub. Set frames, of the configuration or in adapter_config.json, to where "
                "they are now."
            ) from error
    try:
        content = path.read_bytes()
        frames = load(content)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"frames={config.frames!r}: {path} is no complete safetensors file ({error}). Copy or download it again."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if config.frames_digest not in (None, digest):
        raise ValueError(
            f"frames={config.frames!r}: these are not the frames that the adapter was trained between: the file's "
            f"SHA-256 is {digest[:12]}…, expected {str(config.frames_digest)[:12]}…. Set frames to the folder of those."
        )
    shapes, wanted = ({name: tuple(t.shape) for name, t in part.items()} for part in (frames, expected))
    if shapes != wanted:
        name = min(shapes.items() ^ wanted.items())[0]
        raise ValueError(
            f"frames={config.frames!r}: {name} is {shapes.get(name, 'missing')} there, expected "
            f"{wanted.get(name, 'none of this name')}. They are another model's, or of other targets or another rank."
        )
    for name, frame in frames.items():
        if not frame.is_floating_point() or not torch.isfinite(frame).all():
            raise ValueError(f"frames={config.frames!r}: {name} there has numbers that no frame has. Save them again.")
    config.frames_digest = digest
    return {name: frame.to(expected[name].dtype) for name, frame in frames.items()}
