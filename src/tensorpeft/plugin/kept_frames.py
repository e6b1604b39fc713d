"""Frozen frames that many adapters of one model have in common: kept once, in a file of their own."""

from __future__ import annotations

import copy
import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tensorpeft.networks.update import AbstractUpdate
from tensorpeft.plugin.checkpoint import download_options
from tensorpeft.plugin.config import FramedConfig, TensorConfig
from tensorpeft.plugin.frames_in_memory import in_common, remember
from tensorpeft.plugin.layer import layers_of

FRAMES_NAME = "frames.safetensors"
# The buffer of what has frames that are kept elsewhere: the SHA-256 of their file. It is saved in their place.
FRAMES_DIGEST = "frames_digest"
# An attribute of what was made on the meta device: the file of its frames, and their names there.
_AWAITED = "_awaited_frames"


def save_frames(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Keep an adapter's frozen frames in a file of their own, which other adapters of the model share.

    The folder gets `frames.safetensors`. This adapter and every one that is made with `frames=folder` are then saved
    without frames, and loaded with those of the folder; where they are loaded to one device they share one copy. What
    is saved names the folder as it is given here, and has the file's SHA-256: between other frames it is refused.

    Args:
        model: the result of `get_peft_model`, or a model with injected adapters.
        folder: where to; made if need be. A relative one counts from where a program runs; one that was uploaded to
            the Hub is found by its name there, if `frames` in adapter_config.json says so.
        adapter_name: of an adapter that does not train its frames.

    Raises:
        FileExistsError: the folder holds other frames, which adapters may refer to.
        ValueError: no such adapter, one that trains its frames, or has none, or whose frames are not all finite.

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
    >>> [name.rpartition(".")[2] for name in model.state_dict() if "update.second" in name]
    ['24x24_G', 'frames_digest']
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, FramedConfig) or not config.freezes_frames():
        found = f"one of {sorted(configs)}" if config is None else "an adapter whose frames are frozen"
        raise ValueError(f"adapter_name={adapter_name!r}: expected {found}; no others have frames to keep.")
    places = _places(updates_of(model, adapter_name))
    frames = {name: getattr(module, key).detach().cpu().contiguous() for name, (module, key) in places.items()}
    if wrong := [name for name, frame in frames.items() if not torch.isfinite(frame).all()]:
        raise ValueError(f"{adapter_name}: not all numbers of its frame {wrong[0]} are finite. Make the adapter anew.")
    digest = _write(save(frames), Path(folder))
    for name, (module, key) in places.items():
        frame = getattr(module, key)
        _put(module, key, frame, digest)
        remember(digest, name, frame)
    configs[adapter_name] = copy.copy(config)  # the old one may be another adapter's too
    configs[adapter_name].frames = os.fspath(folder)


def take_frames(
    updates: Mapping[str, AbstractUpdate],  # by the names of their weights
    config: TensorConfig,
    bases: Mapping[str, Any],  # the layers of these names
) -> None:
    """Put the frames of a configuration's file, if it names one, into updates, whose own tensors they no longer are.

    Updates on the meta device wait for them until a checkpoint is loaded.

    Raises:
        ValueError: there is no such file, or it is damaged, or of another adapter's frames.
    """
    if not isinstance(config, FramedConfig) or config.frames is None:
        return
    places = _places(updates)
    expected: dict[str, Tensor] = {name: getattr(module, key) for name, (module, key) in places.items()}
    if any(frame.is_meta for frame in expected.values()):
        awaited = _AwaitedFile(config.frames)
        for name, (module, key) in places.items():
            _put(module, key, expected[name], bytes(hashlib.sha256().digest_size))
            vars(module).setdefault(_AWAITED, (awaited, {}))[1][key] = name
        return
    first = next(iter(bases.values()))
    frames, digest = _read(_find(config.frames), config.frames)
    _check(frames, expected, config.frames)
    for name, (module, key) in places.items():
        device, is_double = _home_of(bases.get(name.rpartition(".")[0], first))
        frame = _narrow(frames[name], is_double, f"frames={config.frames!r}: {name}")
        _put(module, key, in_common(digest, name, frame, device), digest)


@torch.no_grad()
def copy_frames(
    tuner: BaseTuner,
    config: TensorConfig,
    adapter_name: str,
    updates: Mapping[str, AbstractUpdate],  # of that adapter, just built, by the names of their weights
) -> None:
    """Give an adapter that is made with the very configuration of another one the frozen frames of that.

    TRL makes the reference of a trained adapter so, and copies to it what is trained alone.
    """
    if not isinstance(config, FramedConfig) or not config.freezes_frames() or config.frames is not None:
        return
    twins = (name for name, other in tuner.peft_config.items() if other is config and name != adapter_name)
    if (twin := next(twins, None)) is None:
        return
    found = _places(updates_of(tuner.model, twin))
    for name, place in _places(updates).items():
        frame: Tensor = getattr(*place)
        # Where the configuration has been changed in between, there are others, or none.
        if name in found and getattr(*found[name]).shape == frame.shape and not frame.is_meta:
            frame.copy_(getattr(*found[name]))


def check_cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Raise a `ValueError` if a cast would round frames that the adapter's file does not hold."""
    if FRAMES_DIGEST in module._buffers and dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"autocast_adapter_dtype=False: in {str(dtype).removeprefix('torch.')} the adapter would stand between "
            "other frames than those that are kept for it. Leave it out (True, the default)."
        )


def other_frames(update: nn.Module, found: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a checkpoint's part of an update, or of what updates share; None: its frames are the same."""
    own, digest = update._buffers.get(FRAMES_DIGEST), found.get(FRAMES_DIGEST)
    if own is None or digest is None or own.is_meta or digest.is_meta or _AWAITED in vars(update):
        return None
    if torch.equal(own.cpu(), digest.cpu()):
        return None
    return (
        f"it was trained between other frames: their SHA-256 is {_hex(digest)}…, that of the frames here {_hex(own)}…. "
        "Load it with its own adapter_config.json, and with frames as they were there."
    )


def updates_of(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """An adapter's updates by the names that their layers had when the first adapter was made."""
    layers = [layer for layer in layers_of(model) if adapter_name in layer.updates]
    return {layer.name: layer.updates[adapter_name] for layer in layers}


def _places(updates: Mapping[str, AbstractUpdate]) -> dict[str, tuple[nn.Module, str]]:
    """The module of every frame, and its name there, by the name in the file: of one's own, the weight's before it."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, update in updates.items():
        for module, stem in ((update, f"{name}."), (update.shared, "")):
            keys = set() if module is None else set(module._buffers) - {FRAMES_DIGEST}
            found.update({f"{stem}{key}": (module, key) for key in sorted(keys) if module is not None})
    return found


def _put(module: nn.Module, key: str, frame: Tensor, digest: bytes) -> None:
    if FRAMES_DIGEST not in module._buffers:
        module.register_load_state_dict_pre_hook(_check_digest)
    module.register_buffer(key, frame, persistent=False)
    device = "meta" if frame.is_meta else frame.device
    module.register_buffer(FRAMES_DIGEST, torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device))


def _check_digest(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse a state dict from between other frames, in whatever model; of the meta device, take the frames first."""
    digest = state_dict.get(f"{prefix}{FRAMES_DIGEST}")
    if digest is None or digest.is_meta:
        return
    if _AWAITED in vars(module):
        file, names = vars(module)[_AWAITED]
        frames, found = file.read()
        awaited = {name: getattr(module, key) for key, name in names.items()}
        _check({name: frame for name, frame in frames.items() if name in awaited}, awaited, file.place)
        for key, name in names.items():
            frame = _narrow(frames[name], True, f"frames={file.place!r}: {name}")
            _put(module, key, in_common(found, name, frame, digest.device), found)
        del vars(module)[_AWAITED]
    if problem := other_frames(module, {FRAMES_DIGEST: digest}):
        raise ValueError(f"{prefix.rstrip('.')}: {problem}")


class _AwaitedFile:
    """The file of an adapter's frames, for modules that take theirs one by one: read again only if it has changed.

    They alone have it, so that what was read goes with the last of them that waits.
    """

    def __init__(self, place: str):
        self.place = place
        self._known: tuple[Path, object, tuple[dict[str, Tensor], bytes]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "_known": None}  # a copy reads for itself

    def read(self) -> tuple[dict[str, Tensor], bytes]:
        """The frames, and their file's SHA-256."""
        if self._known is None or self._known[1] != _stamp_of(self._known[0]):
            path = _find(self.place)
            self._known = (path, _stamp_of(path), _read(path, self.place))
        return self._known[2]


def _stamp_of(path: Path) -> object:
    """Another one where the file has been written in between, or is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _home_of(base: Any) -> tuple[torch.device, bool]:
    """Where a layer's update is, and whether the layer's numbers are float64, which an update's then may be."""
    weight = getattr(base, "weight", None)
    # One that is put away between calls comes to where it computes with the rest of its update.
    device = torch.device("cpu") if weight is None or weight.is_meta else weight.device
    return device, weight is not None and weight.dtype == torch.float64


def _narrow(frame: Tensor, may_be_double: bool, what: str) -> Tensor:
    """A frame in float32, in which adapters are made, or as it is where that loses something."""
    if torch.equal(narrow := frame.float(), frame):
        return narrow
    if may_be_double:
        return frame
    raise ValueError(
        f"{what} there is {str(frame.dtype).removeprefix('torch.')}, with numbers that float32, in which this model's "
        "adapters are made, does not have. Load the model in float64, with autocast_adapter_dtype=False."
    )


def _write(content: bytes, folder: Path) -> bytes:
    """Write the file, unless the same one is there; its SHA-256."""
    digest, path = hashlib.sha256(content).digest(), folder / FRAMES_NAME
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{FRAMES_NAME}.{uuid.uuid4().hex}"
    try:
        unfinished.write_bytes(content)
        try:
            os.link(unfinished, path)  # whole, or not at all, and never over another one
        except FileExistsError:
            raise
        except OSError:  # a disk without links
            with open(path, "xb") as stream:
                stream.write(content)
    except FileExistsError:
        if hashlib.sha256(path.read_bytes()).digest() != digest:
            raise FileExistsError(
                f"{path} holds other frames, without which adapters that refer to it are lost. Name another folder."
            ) from None
    finally:
        unfinished.unlink(missing_ok=True)
    return digest


def _find(place: str) -> Path:
    """The file of frames in a folder, or in a repository on the Hub."""
    if os.path.exists(place):  # asked of what can be no path too
        return Path(place, FRAMES_NAME)
    try:
        return Path(hf_hub_download(place, FRAMES_NAME, **download_options()))
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"frames={place!r}: expected a folder with {FRAMES_NAME}, as tensorpeft.save_frames leaves it, or the "
            "name of one on the Hub. Set frames, of the configuration or in adapter_config.json, to where they are "
            "now."
        ) from error


def _read(path: Path, place: str) -> tuple[dict[str, Tensor], bytes]:
    """A file's frames, and its SHA-256."""
    try:
        content = path.read_bytes()
        return load(content), hashlib.sha256(content).digest()
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"frames={place!r}: {path} is no complete safetensors file ({error}). Copy or download it again."
        ) from error


def _check(frames: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str | None) -> None:
    """Raise a `ValueError` unless a file's frames are those of an adapter."""
    shapes, wanted = ({name: tuple(t.shape) for name, t in part.items()} for part in (frames, expected))
    if shapes != wanted:
        name = min(name for name, _ in shapes.items() ^ wanted.items())
        raise ValueError(
            f"frames={place!r}: {name} is {shapes.get(name, 'missing')} there, expected "
            f"{wanted.get(name, 'none of this name')}. They are another model's, or of other targets or another rank."
        )
    for name, frame in frames.items():
        if not frame.is_floating_point() or not torch.isfinite(frame).all():
            raise ValueError(f"frames={place!r}: {name} there has numbers that no frame has. Save them again.")


def _hex(digest: Tensor) -> str:
    return bytes(digest.cpu().tolist()).hex()[:12]
