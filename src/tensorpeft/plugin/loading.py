"""Is this checkpoint for this model? Asked of the whole adapter before its first tensor is loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _remove_adapter_name_from_state_dict_key
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorpeft.networks.update import BASE_DIGEST, AbstractUpdatableLinear, AbstractWeightUpdate
from tensorpeft.plugin.base_weight import StackedWeight, as_matrix, as_stack
from tensorpeft.plugin.checkpoint import reads_files, verifies_base
from tensorpeft.plugin.config import FramedConfig, TensorConfig, own_fields
from tensorpeft.plugin.holder import UpdateHolder
from tensorpeft.plugin.kept_frames import other_frames
from tensorpeft.plugin.layer import TensorLayer

# The 4-bit form of a weight moves the share by less than 0.01, a fully fine-tuned base by a few hundredths.
_SHARE_TOLERANCE = 0.2
# What torch's checkpointing of activations, as FSDP applies it, adds to the names of modules, not to those of tensors.
_CHECKPOINTED = "_checkpoint_wrapped_module."
# What PEFT puts before the name of a module of the base model in a checkpoint's keys.
_BASE_PREFIX = "base_model.model."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def key_of(name: str) -> str:  # of a module, or the beginning of one
    """Its name in the keys of a state dict."""
    return name.replace(_CHECKPOINTED, "")


def check_checkpoint(
    model: nn.Module, config: TensorConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A checkpoint's tensors, all of them of this adapter, in a dtype that holds them and the adapter's.

    Args:
        model: a `PeftModel`, or one with injected adapters, that has the adapter.
        config: the adapter's.
        adapter_name: its name.
        state_dict: without the adapter's name in its keys, but for what PEFT trains in full.

    Raises:
        ValueError: a tensor of the adapter is missing, of another shape, of a dtype that cannot be what was trained, or
            not finite; or there is a tensor that is not the adapter's, and would go into the base model or into
            another adapter. Nothing has been changed.
    """
    holders = _holders_of(model, adapter_name)
    updates = {stem: holder.updates[adapter_name] for stem, holder in holders.items()}
    if not reads_files() and not (isinstance(config, FramedConfig) and config.freezes_frames()):
        state_dict = {**_zero_starts(updates, state_dict), **state_dict}
    found = {own_key(key): tensor for key, tensor in state_dict.items()}
    check_tensors(updates, found, config)
    expected = {
        f"{stem}{key}": _as_on_device(tensor, holder)
        for stem, holder in holders.items()
        for key, tensor in _saved(updates[stem]).items()
    }
    others = [key for key in state_dict if own_key(key) not in expected]
    allowed = _trained_in_full(model, adapter_name)
    if not allowed.keys() >= set(others):
        allowed |= _saved_embeddings(model, others, adapter_name)
    checked = {}
    for key, tensor in state_dict.items():
        held = expected.get(own_key(key), allowed.get(key))
        if held is None or len(found) < len(state_dict):  # a tensor that is there under two names
            raise ValueError(
                f"{key}: the checkpoint has this tensor, which is not one of the adapter {adapter_name!r}: it would "
                "go into the base model, or into another adapter. Save the adapter again with save_pretrained, or take "
                "the tensor out of the file."
            )
        checked[key] = _as_held(key, tensor, held)
    if verifies_base():
        _check_digests(holders, adapter_name)
    return checked


def _zero_starts(updates: Mapping[str, nn.Module], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The frozen tensors of an adapter in memory that has none at all: it is one that subtracts nothing.

    PEFT's users hand such adapters over between configurations that differ in where they start.
    """
    frozen = {
        f"{stem}{key}": buffer
        for stem, update in updates.items()
        for key, buffer in update.named_buffers()
        if key in _saved(update)
    }
    parts = _parts({own_key(key): tensor for key, tensor in state_dict.items()}, updates)
    given = {f"{stem}{key}" for stem, part in parts.items() for key in part}
    if not given or not given.isdisjoint(frozen) or any(key.endswith(f".{BASE_DIGEST}") for key in frozen):
        return {}
    prefix = _BASE_PREFIX if any(key.startswith(_BASE_PREFIX) for key in state_dict) else ""
    return {f"{prefix}{key}": torch.zeros_like(buffer, device="cpu") for key, buffer in frozen.items()}


def _check_digests(holders: Mapping[str, UpdateHolder], adapter_name: str) -> None:
    """Raise a `ValueError` where a base layer that holds an update's start is no longer what its digest says."""
    for stem, layer in holders.items():
        digest = dict(layer.updates[adapter_name].named_buffers()).get(BASE_DIGEST)
        base = layer.get_base_layer()
        if digest is None or not isinstance(base, AbstractUpdatableLinear) or base.weight.is_meta:  # type: ignore[union-attr]
            continue
        if not torch.equal((current := base.current_digest()).cpu(), digest.cpu()):
            raise ValueError(
                f"{stem.rsplit('.', 2)[0]}: this layer is not {_describe(digest)} that it says it is, but has the "
                f"digest {_hex(current)}…: its weight in 4 bits, the statistics of that or its start have changed. "
                "Download or quantise the base again."
            )


def check_starts(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` if an update in a checkpoint (see `check_checkpoint`) was started from another base."""
    holders = _holders_of(model, adapter_name)
    found = {own_key(key): tensor for key, tensor in state_dict.items()}
    for stem, part in _parts(found, holders).items():
        if isinstance(layer := holders[stem], TensorLayer):
            _check_start(model, stem.rsplit(".", 2)[0], layer, adapter_name, part)


def check_tensors(
    updates: Mapping[str, nn.Module],  # by the beginning of their keys
    found: Mapping[str, Tensor],  # a checkpoint's, by the base model's names; those of other modules are passed over
    config: TensorConfig,
) -> None:
    """Raise a `ValueError` unless a checkpoint has all tensors of the updates, in their shapes, and no others."""
    parts: dict[str, dict[str, Tensor]] = {stem: {} for stem in updates}
    names = {stem.rsplit(".", 2)[-2] for stem in updates}
    for key, tensor in found.items():
        name = next((name for name in names if f".{name}." in key), None)
        if name is None:
            continue
        layer, _, rest = key.rpartition(f".{name}.")
        if f"{layer}.{name}." not in parts:
            raise ValueError(
                f"{layer}: the checkpoint has {rest} for this layer, to which this adapter adds nothing: it was made "
                "for another model, or with another target_modules. Load it on the model it was trained on "
                "(base_model_name_or_path in adapter_config.json), with its own adapter_config.json."
            )
        if "." in rest:
            raise ValueError(
                f"{layer}: the checkpoint has {rest}, expected a tensor's name without an adapter's before it. It is "
                "the state of a whole model, or damaged: save the adapter with save_pretrained."
            )
        parts[f"{layer}.{name}."][rest] = tensor
    for stem, update in updates.items():
        if problem := _other_own_part(update, parts[stem]) or _misfit(update, parts[stem], config):
            raise ValueError(f"{stem.rsplit('.', 2)[0]}: {problem}")


def own_key(key: str) -> str:
    """A checkpoint's key, or a module's name, as the base model has it."""
    return key.removeprefix(_BASE_PREFIX)


def _saved(update: nn.Module) -> dict[str, Tensor]:
    return update.state_dict(keep_vars=True)


def _as_on_device(tensor: Tensor, holder: UpdateHolder) -> Tensor:
    """The tensor or, for one that was allocated on the meta device, in the dtype that it had been built in."""
    if not tensor.is_meta or tensor.dtype != torch.float32:
        return tensor
    _, dtype = holder._get_base_layer_device_and_dtype(holder.get_base_layer())
    return tensor.double() if dtype == torch.float64 else tensor


def _as_held(key: str, tensor: Tensor, held: Tensor) -> Tensor:
    """A tensor of a checkpoint, widened to the dtype it will be held in.

    Raises:
        ValueError: it has another shape, or numbers that it cannot have.
    """
    if tensor.shape != held.shape:
        raise ValueError(
            f"{key} is {tuple(tensor.shape)} in the checkpoint, expected {tuple(held.shape)} for this model. Load it "
            "on the model it was trained on, with as many tokens, or labels."
        )
    dtypes = _FLOATS if held.is_floating_point() else (held.dtype,)
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{key} is {str(tensor.dtype).removeprefix('torch.')} in the checkpoint, expected {expected}: these are "
            "not the numbers that were trained. Save the adapter again."
        )
    if tensor.is_meta or not held.is_floating_point():
        return tensor
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{key}: not all numbers in the checkpoint are finite. The training has diverged, or the file is damaged: "
            "load an earlier checkpoint."
        )
    if tensor.dtype == torch.float64 and held.dtype == torch.float32:
        if not torch.equal(narrow := tensor.float(), tensor):
            raise ValueError(
                f"{key} is float64 in the checkpoint, with numbers that float32, in which this model holds it, does "
                "not have. Load the model in float64, or save the adapter in float32."
            )
        return narrow
    return tensor.to(torch.promote_types(tensor.dtype, held.dtype))


def _trained_in_full(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of PEFT's own modules that an adapter brings (`modules_to_save`), by their keys in the model."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = module.state_dict(keep_vars=True)
            keys = module.adapter_state_dict_load_map(adapter_name).values()
            tensors.update({f"{key_of(name)}.{key}": own[key] for key in keys})
    return tensors


def _saved_embeddings(model: nn.Module, others: Iterable[str], adapter_name: str) -> dict[str, Tensor]:
    """The tensors that PEFT saves beside an adapter for `save_embedding_layers`, by key; none if one is missing.

    It saves input and output embeddings or, where one of them is adapted, the layer under the adapter.
    """
    try:
        layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return {}
    if any(isinstance(layer, BaseTunerLayer) for layer in layers):
        layers = [layer.base_layer for layer in layers if isinstance(layer, BaseTunerLayer)]  # type: ignore
    tensors = {
        _remove_adapter_name_from_state_dict_key(f"{key_of(name)}.{key}", adapter_name): tensor
        for name, module in model.named_modules()
        if any(module is layer for layer in layers)
        for key, tensor in module.state_dict(keep_vars=True).items()
    }
    # Of modules that are trained in full too, PEFT saves this adapter's copy alone.
    needed = {key for key in tensors if ".modules_to_save." not in key}
    return tensors if needed <= set(others) else {}


def check_state_dict(tuner: BaseTuner, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A tuner's `load_state_dict` pre-hook: of a checkpoint that is checked already, or of a model with its adapters.

    Raises:
        ValueError: an update's tensors are there only in part, or have another shape, or the update was started from
            another base model (a warning where the base is a plain torch module). Nothing has been changed.
    """
    holders = [(name, module) for name, module in tuner.named_modules() if isinstance(module, UpdateHolder)]
    stems = {
        f"{prefix}{key_of(name)}.{layer.adapter_layer_names[0]}.{adapter_name}.": (name, layer, adapter_name)
        for adapter_name in tuner.peft_config
        for name, layer in holders
        if adapter_name in layer.updates
    }
    for stem, part in _parts(state_dict, stems).items():
        name, layer, adapter_name = stems[stem]
        config, update = tuner.peft_config[adapter_name], layer.updates[adapter_name]
        assert isinstance(config, TensorConfig)
        shown = name.removeprefix("model.")
        if problem := _other_own_part(update, part) or _misfit(update, part, config):
            raise ValueError(f"{shown}: {problem}")
        if isinstance(layer, TensorLayer):
            weight = _weight_in(state_dict, f"{prefix}{key_of(name)}", layer)
            _check_start(tuner.model, shown, layer, adapter_name, part, weight)


def _weight_in(state_dict: Mapping[str, Tensor], name: str, layer: TensorLayer) -> Tensor | None:
    """The weight of an adapted layer's base in a state dict of the whole model, as the base stores it, if it is there.

    An expert's is a part of the parameter `experts.base_layer.down_proj` where its own name is `experts.3.down_proj`.
    """
    base = layer.get_base_layer()
    if not isinstance(base, StackedWeight):
        return state_dict.get(f"{name}.{_path_to_base(layer)}weight")
    stack = state_dict.get(f"{name.rsplit('.', 2)[0]}.base_layer.{base.parameter}")
    return None if stack is None else as_stack(base.owner, stack)[base.index]


def _holders_of(model: nn.Module, adapter_name: str) -> dict[str, UpdateHolder]:
    """By the beginning of their keys in a checkpoint, by the base model's names."""
    return {
        f"{own_key(key_of(name))}.{module.adapter_layer_names[0]}.": module
        for name, module in model.named_modules()
        if isinstance(module, UpdateHolder) and adapter_name in module.updates
    }


def _path_to_base(layer: Any) -> str:  # an adapted layer
    path = ""
    while isinstance(layer, BaseTunerLayer):
        layer, path = layer.base_layer, f"{path}base_layer."  # type: ignore
    return path


def _parts(state_dict: Mapping[str, Tensor], stems: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors whose keys begin with each stem, by the rest of their keys, in the stems' order; none are empty."""
    parts: dict[str, dict[str, Tensor]] = {stem: {} for stem in stems}
    for key, tensor in state_dict.items():
        for stem in accumulate(f"{word}." for word in key.split(".")[:-1]):
            if stem in parts:
                parts[stem][key.removeprefix(stem)] = tensor
    return {stem: part for stem, part in parts.items() if part}


def _misfit(update: nn.Module, found: Mapping[str, Tensor], config: TensorConfig) -> str | None:
    """What is wrong with one update's part of a checkpoint; None if nothing is."""
    expected = _saved(update)
    settings = ", ".join(own_fields(config))  # what the tensors depend on
    if more := sorted(set(found) - set(expected)):
        return (
            f"the checkpoint has {more}, which this adapter does not: it was made with another configuration "
            f"({settings}). Load it with the adapter_config.json it was saved with."
        )
    if missing := sorted(set(expected) - set(found)):
        return (
            f"the checkpoint has {sorted(found)} but not {missing} for this layer: it is incomplete, or was made with "
            "another configuration. Save it again, or load it with its own adapter_config.json."
        )
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            return (
                f"{key} is {tuple(tensor.shape)} in the checkpoint, expected {tuple(expected[key].shape)} for this "
                "model and configuration. Load it on the model it was trained on (base_model_name_or_path in "
                f"adapter_config.json), with the settings it was trained with ({settings})."
            )
    return other_frames(update, found)


def _check_start(
    model: nn.Module,
    name: str,  # of the layer, for messages
    layer: TensorLayer,
    adapter_name: str,
    found: Mapping[str, Tensor],  # all tensors of its update
    weight: Tensor | None = None,  # that the base layer is going to have, as it stores it; None: the one it has
) -> None:
    """Raise a `ValueError` (a warning, where the base is a plain torch module) if its start is of another base."""
    problem = _foreign_start(layer, layer.updates[adapter_name], found, weight)
    if problem and isinstance(model, PreTrainedModel):
        raise ValueError(f"{name}: {problem}")
    if problem:
        # A plain torch module has no identity that an adapter could belong to; PEFT's users load it on any.
        warnings.warn(f"{name}: {problem}", UserWarning, stacklevel=2)


def _other_own_part(update: nn.Module, found: Mapping[str, Tensor]) -> str | None:
    """Whether checkpoint and update start at what different base layers hold themselves, or only one of them does."""
    mine, theirs = dict(update.named_buffers()).get(BASE_DIGEST), found.get(BASE_DIGEST)
    if not found or (mine is None and theirs is None):
        return None
    if mine is not None and theirs is not None and (theirs.is_meta or torch.equal(mine.cpu(), theirs.cpu())):
        return None
    return (
        f"this adapter was trained on {_describe(theirs)}, but this model has {_describe(mine)} here. Load it on the "
        "very base that it was trained on: its tensors count only together with that base's residual. A base that was "
        "quantised in memory has to be saved (save_pretrained) to be loaded again."
    )


def _describe(digest: Tensor | None) -> str:
    if digest is None:
        return "a base without a residual"
    return "a residual base" if digest.is_meta else f"the residual base {_hex(digest)}…"


def _hex(digest: Tensor) -> str:
    return digest.cpu().numpy().tobytes().hex()[:12]


def _foreign_start(
    layer: TensorLayer, update: nn.Module, found: Mapping[str, Tensor], weight: Tensor | None
) -> str | None:
    """Whether a checkpoint's start, which the update says is the layer's own weight cut down, is not.

    A start S that is an orthogonal projection of W0 has ⟨W0, S⟩ = ‖S‖²; for an unrelated weight the product is near 0.
    Another dtype, quantisation or a bit of training of the base hardly move it.
    """
    if not isinstance(update, AbstractWeightUpdate) or not update.starts_at_projection:
        return None
    if BASE_DIGEST in found:
        return None  # its start is the base layer's own
    candidate = copy.deepcopy(update)
    candidate.load_state_dict(dict(found), assign=True)
    if weight is not None and layer.quantization_backend is not None:
        return None  # in a form that only the layer can read, and does not have yet
    base = layer.read_base_weight() if weight is None else as_matrix(layer.get_base_layer(), weight)
    if base.is_meta or (start := candidate.start_matrix()) is None:
        return None
    energy = (projection := start.to(base.device)).square().sum()
    if hasattr(base, "full_tensor"):  # FSDP has sharded it; every process asks for the same layer now
        base = base.full_tensor()  # type: ignore[operator]
    share = (base.to(projection.dtype) * projection).sum() / energy
    if energy == 0 or abs(share - 1) < _SHARE_TOLERANCE:
        return None
    return (
        f"this adapter was started from another base model: of its start, {share:.0%} lies in this layer's weight, "
        "expected 100%. Load it on the model it was trained on (base_model_name_or_path in adapter_config.json)."
    )
