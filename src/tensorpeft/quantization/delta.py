"""A file of quantised updates, and how it is added to the weights that they are for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tensorpeft.networks.effective import dithered
from tensorpeft.networks.rounded_blocks import BLOCK_SIZE, Blocks, block_shapes, from_blocks
from tensorpeft.plugin.base_weight import (
    StackedWeight,
    as_matrix,
    as_stored,
    check_whole,
    is_convolution,
    put_weight,
)

CONFIG_NAME, WEIGHTS_NAME = "delta_config.json", "delta.safetensors"
FORMAT_VERSION = 1
BITS = (8, 4)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AGAIN = "Export or download the delta again."
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class DeltaConfig:
    """What stands beside the numbers.

    Args:
        base_model_name_or_path: of the model that the updates are for; None: not known.
        method: that they were trained with, such as DOTA.
        bits: of a number, 8 or 4.
        block_size: how many numbers have a scale in common.
        sha256: of the file of tensors.
        shapes: the updates' (out, in), by the names of their layers.
        format_version: of all this.
    """

    base_model_name_or_path: str | None
    method: str
    bits: int
    block_size: int
    sha256: str
    shapes: Mapping[str, tuple[int, int]]
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Write it."""
        (folder / CONFIG_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def is_delta(folder: str | os.PathLike[str]) -> bool:
    """Whether there is one in the folder."""
    return Path(folder, CONFIG_NAME).is_file()


def digest_of(file: Path) -> str:
    """Its SHA-256, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@torch.no_grad()
def load_delta(model: _Model, folder: str | os.PathLike[str]) -> _Model:
    """Add what `tensorpeft export delta` wrote to the model's weights, and return the model: as if merged.

    Every weight becomes `W + scale · q`, added in float32 (in float64 for such a base), cast once to the weight's own
    dtype, as merging casts it: to bfloat16 and float16 with a dither, so that no small update is lost. It is given a
    new tensor. One weight at a time is in memory twice.

    Args:
        model: the base that the adapter was trained on, in float32, bfloat16, float16 or float64; of another size or
            with other names it is refused, but its numbers are not looked at.
        folder: with delta_config.json and delta.safetensors.

    Raises:
        ValueError: the folder has no complete delta, it does not fit the model, has been added to it already, would
            make a weight that is not finite, or the model has adapters or a quantised weight; the model is as before.

    >>> model = load_delta(AutoModelForCausalLM.from_pretrained(base), "my-delta")  # doctest: +SKIP
    """
    folder = Path(folder)
    config = _read_config(folder)
    applied: tuple[str, ...] = getattr(model, "_deltas", ())
    if config.sha256 in applied:
        raise ValueError(
            f"{folder}: this delta has been added to this model already. Load the base anew to start over."
        )
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model has adapters; a delta is added to plain weights. Merge or unload them first "
            "(merge_and_unload, unload), or add the delta before they are made."
        )
    modules = dict(model.named_modules())
    bases = {name: _find_layer(modules, name, shape, folder) for name, shape in config.shapes.items()}
    _check_ties(model, bases)
    with _opened(folder / WEIGHTS_NAME) as file:
        _check_file(folder / WEIGHTS_NAME, file, config)
        for name in bases:  # what could fail does so before the first weight is changed
            _merged(file, config, name, bases[name])
        for name, base in bases.items():
            put_weight(base, as_stored(base, _merged(file, config, name, base)).contiguous())
    model._deltas = (*applied, config.sha256)  # type: ignore[assignment]
    return model


def _merged(file: Any, config: DeltaConfig, name: str, base: nn.Module) -> Tensor:  # (out, in)
    weight = as_matrix(base, base.weight.detach())  # type: ignore[arg-type]
    blocks = Blocks(*(file.get_tensor(f"{name}.{part}").to(weight.device) for part in Blocks._fields))
    update = from_blocks(blocks, tuple(weight.shape), config.bits)
    total = weight.to(torch.promote_types(weight.dtype, torch.float32)) + update
    merged = dithered(total, weight.dtype).to(weight.dtype)
    if not merged.isfinite().all():
        raise ValueError(f"{name}: W + ΔW is not finite in {weight.dtype}. Load the base in float32, or export again.")
    return merged


def _read_config(folder: Path) -> DeltaConfig:
    path = folder / CONFIG_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["format_version"]
        if version == FORMAT_VERSION:
            config = DeltaConfig(**{item.name: found[item.name] for item in fields(DeltaConfig)})
            shapes = {name: (int(out), int(in_)) for name, (out, in_) in config.shapes.items()}
            if config.bits in BITS and config.block_size == BLOCK_SIZE and shapes and type(config.sha256) is str:
                return DeltaConfig(**{**vars(config), "shapes": shapes})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no configuration of a delta ({type(error).__name__}: {error}). {_AGAIN}") from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"{path}: format {version}, and this tensorpeft reads {FORMAT_VERSION}. Install a newer one.")
    raise ValueError(
        f"{path}: expected format_version={FORMAT_VERSION}, bits {' or '.join(map(str, BITS))}, "
        f"block_size={BLOCK_SIZE}, a digest and shapes. {_AGAIN}"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}). {_AGAIN}") from error


def _check_file(path: Path, file: Any, config: DeltaConfig) -> None:
    """Raise a `ValueError` unless the file has what the configuration says, in this form."""
    if (found := digest_of(path)) != config.sha256:
        raise ValueError(f"{path}: its SHA-256 is {found}, and {CONFIG_NAME} says {config.sha256}. {_AGAIN}")
    expected: dict[str, tuple[int, torch.dtype]] = {}
    for name, shape in config.shapes.items():
        forms = block_shapes(torch.Size(shape).numel(), config.bits)
        expected |= {f"{name}.{part}": form for part, form in zip(Blocks._fields, forms)}
    if keys := sorted(expected.keys() ^ set(file.keys())):
        raise ValueError(f"{path}: its tensors are not those that {CONFIG_NAME} says, such as {keys[0]}. {_AGAIN}")
    for key, (length, dtype) in expected.items():
        tensor = file.get_tensor(key)
        if tensor.shape != (length,) or tensor.dtype != dtype:
            raise ValueError(
                f"{path}: {key} is {tuple(tensor.shape)} of {tensor.dtype}, expected ({length},) of {dtype}. {_AGAIN}"
            )


def _find_layer(modules: Mapping[str, nn.Module], name: str, shape: tuple[int, int], folder: Path) -> nn.Module:
    """The layer of that name, or one matrix of a parameter, as `target_parameters` calls them.

    Raises:
        ValueError: there is none, or not one with a plain weight of that shape.
    """
    base = modules.get(name) or _find_expert(modules, name)
    if base is None:
        raise ValueError(
            f"{folder}: the model, a {type(modules['']).__name__}, has no layer {name}. Load the base that the adapter "
            "was trained on, as the class that it was trained as (AutoModelForCausalLM, for example)."
        )
    if not (isinstance(base, (nn.Linear, Conv1D, StackedWeight)) or is_convolution(base)):
        raise ValueError(f"{name}: a {type(base).__name__}, expected a linear layer or a convolution. {_PLAIN}")
    check_whole(base, name)
    weight: Any = base.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in _DTYPES or weight.is_meta:
        kind = "on the meta device, or put away by accelerate" if weight.is_meta else f"a {type(weight).__name__}"
        raise ValueError(f"{name}: its weight is {kind} of {weight.dtype}. {_PLAIN}")
    if (found := tuple(as_matrix(base, weight).shape)) != shape:
        raise ValueError(f"{name}: its weight is {found}, and the delta's {shape}. Load the delta's own base.")
    return base


def _find_expert(modules: Mapping[str, nn.Module], name: str) -> StackedWeight | None:
    owner, _, rest = name.rpartition(".")
    owner, _, index = owner.rpartition(".")
    stack = getattr(modules.get(owner), rest, None)
    if isinstance(stack, Tensor) and stack.ndim == 3 and index.isdecimal() and int(index) < len(stack):
        return StackedWeight(modules[owner], rest, int(index))
    return None


_PLAIN = (
    "A delta is added to plain weights in float32, bfloat16 or float16, whole and in memory: quantised again, they "
    "would lose it. Load the base without quantisation and offloading, or make a plain model of one in 4 bits "
    "(tensorpeft.quantization.dequantize)."
)


def _check_ties(model: nn.Module, bases: Mapping[str, nn.Module]) -> None:
    """Raise a `ValueError` if a weight is another layer's, too, which would change with it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, base in bases.items():
        if len(shared := names.get(id(base.weight), [])) > 1:
            raise ValueError(
                f"{name}: its weight is that of {' and '.join(shared)}, and the delta is for one of them. Merge the "
                "adapter into the model instead (merge_and_unload)."
            )
