"""Is this checkpoint for this model? Asked of the whole adapter before its first tensor is loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorpeft.networks.effective import fold
from tensorpeft.networks.update import BASE_DIGEST, AbstractWeightUpdate
from tensorpeft.plugin.config import own_fields
from tensorpeft.plugin.holder import UpdateHolder
from tensorpeft.plugin.layer import TensorLayer

# The 4-bit form of a weight moves the share by less than 0.01, a fully fine-tuned base by a few hundredths.
_SHARE_TOLERANCE = 0.2
# What torch's checkpointing of activations, as FSDP applies it, adds to the names of modules, not to those of tensors.
_CHECKPOINTED = "_checkpoint_wrapped_module."


def key_of(name: str) -> str:  # of a module, or the beginning of one
    """Its name in the keys of a state dict."""
    return name.replace(_CHECKPOINTED, "")


def check_state_dict(tuner: BaseTuner, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A tuner's `load_state_dict` pre-hook.

    A checkpoint without an update's buffers is one of an update that subtracts nothing: they are zero.

    Raises:
        ValueError: a tensor has another shape than the adapter it is loaded into, an update's tensors are there only in
            part, there are more than the update has, or the update was started from another base model (a warning where
            the base is a plain torch module). An adapter that was made for this checkpoint
            (`PeftModel.from_pretrained`, `load_adapter`) is taken out of the model again.
    """
    for module_name, layer in tuner.named_modules():
        if not isinstance(layer, UpdateHolder):
            continue
        name = key_of(module_name)
        stem = f"{prefix}{name}.{layer.adapter_layer_names[0]}."
        for adapter_name, update in layer.updates.items():
            found = _part(state_dict, f"{stem}{adapter_name}.")
            unmapped = _part(state_dict, stem)
            settings = ", ".join(own_fields(tuner.peft_config[adapter_name]))
            problem = _other_own_part(update, found, unmapped) or _misfit(update, found, unmapped, settings)
            is_layer = isinstance(layer, TensorLayer)
            foreign = _foreign_start(layer, update, found) if is_layer and not problem else None
            if foreign and not isinstance(tuner.model, PreTrainedModel):
                # A plain torch module has no identity that an adapter could belong to; PEFT's users load it on any.
                warnings.warn(f"{name.removeprefix('model.')}: {foreign}", UserWarning, stacklevel=2)
            elif problem or foreign:
                _remove(tuner, adapter_name)
                raise ValueError(f"{name.removeprefix('model.')}: {problem or foreign}")
            for key, buffer in update.named_buffers() if found else ():
                state_dict.setdefault(f"{stem}{adapter_name}.{key}", torch.zeros_like(buffer))


def _part(state_dict: Mapping[str, Tensor], stem: str) -> dict[str, Tensor]:
    return {key.removeprefix(stem): tensor for key, tensor in state_dict.items() if key.startswith(stem)}


def _other_own_part(update: nn.Module, found: Mapping[str, Tensor], unmapped: Mapping[str, Tensor]) -> str | None:
    """Whether checkpoint and update start at what different base layers hold themselves, or only one of them does."""
    mine, theirs = dict(update.named_buffers()).get(BASE_DIGEST), found.get(BASE_DIGEST, unmapped.get(BASE_DIGEST))
    if not found or (mine is None and theirs is None):
        return None
    if mine is not None and theirs is not None and torch.equal(mine.cpu(), theirs.cpu()):
        return None
    return (
        f"this adapter was trained on {_describe(theirs)}, but this model has {_describe(mine)} here. Load it on the "
        "very base that it was trained on: its tensors count only together with that base's residual. A base that was "
        "quantised in memory has to be saved (save_pretrained) to be loaded again."
    )


def _describe(digest: Tensor | None) -> str:
    if digest is None:
        return "a base without a residual"
    return f"the residual base {digest.cpu().numpy().tobytes().hex()[:12]}…"


def _misfit(
    update: nn.Module,
    found: Mapping[str, Tensor],
    unmapped: Mapping[str, Tensor],
    settings: str,  # what of a configuration the tensors depend on
) -> str | None:
    """What is wrong with one update's part of a checkpoint; None if nothing is, or if it has none.

    `found` has the tensors that PEFT mapped to this update. PEFT leaves the key of a tensor that the update does not
    have as it stands in the file, without an adapter's name: those are the ones in `unmapped` that have no dot.
    """
    parameters, buffers = dict(update.named_parameters()), dict(update.named_buffers())
    more = sorted(key for key in unmapped if "." not in key)
    if more and found:
        return (
            f"the checkpoint has {more}, which this adapter does not: it was made with another configuration "
            f"({settings}). Load it with the adapter_config.json it was saved with."
        )
    missing = sorted(set(parameters) - set(found))
    if not set(buffers).isdisjoint(found):
        missing += sorted(set(buffers) - set(found))
    if missing and found:
        return (
            f"the checkpoint has {sorted(found)} but not {missing} for this layer: it is incomplete, or was made with "
            "another configuration. Save it again, or load it with its own adapter_config.json."
        )
    for key, tensor in found.items():
        expected = parameters.get(key, buffers.get(key))
        if expected is not None and tensor.shape != expected.shape:
            return (
                f"{key} is {tuple(tensor.shape)} in the checkpoint, expected {tuple(expected.shape)} for this model "
                "and configuration. Load it on the model it was trained on (base_model_name_or_path in "
                f"adapter_config.json), with the settings it was trained with ({settings})."
            )
    return None


def _foreign_start(layer: TensorLayer, update: nn.Module, found: Mapping[str, Tensor]) -> str | None:
    """Whether a checkpoint's start, which the update says is the layer's own weight cut down, is not.

    A start S that is an orthogonal projection of W0 has ⟨W0, S⟩ = ‖S‖²; for an unrelated weight the product is near 0.
    Another dtype, quantisation or a bit of training of the base hardly move it.
    """
    if not isinstance(update, AbstractWeightUpdate) or not update.starts_at_projection:
        return None
    if set(found) != set(update.state_dict()):
        return None
    if BASE_DIGEST in found:
        return None  # its start is the base layer's own
    candidate = copy.deepcopy(update)
    candidate.load_state_dict(dict(found), assign=True)
    cut = candidate.cut()
    if not cut.start or (weight := layer.read_base_weight()).is_meta:
        return None
    projection = fold(cut.network.halves(cut.start)).to(weight.device)
    energy = projection.square().sum()
    if hasattr(weight, "full_tensor"):  # FSDP has sharded it; every process asks for the same layer now
        weight = weight.full_tensor()  # type: ignore[operator]
    share = (weight.to(projection.dtype) * projection).sum() / energy
    if energy == 0 or abs(share - 1) < _SHARE_TOLERANCE:
        return None
    return (
        f"this adapter was started from another base model: of its start, {share:.0%} lies in this layer's weight, "
        "expected 100%. Load it on the model it was trained on (base_model_name_or_path in adapter_config.json)."
    )


def _remove(tuner: BaseTuner, adapter_name: str) -> None:
    """Take an adapter that was created for a refused checkpoint out of the model again."""
    if not getattr(tuner.peft_config[adapter_name], "is_from_checkpoint", False):
        return
    if len(tuner.peft_config) == 1:
        tuner.unload()
    else:
        tuner.delete_adapter(adapter_name)
