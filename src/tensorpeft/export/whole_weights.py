"""What an adapter has of its model besides its layers' updates: modules, tokens and embeddings as they are."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights
from torch import Tensor


def whole_weights(
    model: PeftModel,
    name: str,  # of an adapter of ours
    folder: str | os.PathLike[str] | None = None,  # that it was loaded from; None: it is in the model alone
) -> dict[str, Tensor]:  # as PEFT names them in a file
    """The weights that are saved beside an adapter's own.

    Of a vocabulary that was resized these are the embeddings, which no field of the configuration names.
    """
    # As they are in the file: PEFT leaves trained tokens on a skeleton's own device.
    saved = get_peft_model_state_dict(model, None, name) if folder is None else load_peft_weights(str(folder), "cpu")
    updates = f".{model.base_model.prefix}update."
    # PEFT saves the weight of an adapted head or embedding beside it, which is the base's own.
    return {key: tensor for key, tensor in saved.items() if updates not in key and ".base_layer." not in key}


def trained_in_full(
    config: PeftConfig,
    keys: Collection[str] = (),  # of the adapter's `whole_weights`
) -> dict[str, Any]:
    """The fields of a configuration that say what of the model is trained besides the layers' updates.

    Where none does, but there are such weights, they are embeddings.
    """
    values = {name: getattr(config, name, None) for name in ("modules_to_save", "trainable_token_indices")}
    if found := {name: value for name, value in values.items() if value}:
        return found
    return {"embeddings": sorted({key.split(".")[-2] for key in keys})} if keys else {}


def refuse_trained_in_full(
    config: PeftConfig,
    reason: str,  # and what to do
    name: str = "",  # of the adapter, for a message that needs it
    keys: Collection[str] = (),  # of the adapter's `whole_weights`
) -> None:
    """Raise a `ValueError` if the adapter has weights besides the layers' updates."""
    for field, value in trained_in_full(config, keys).items():
        raise ValueError(f"{name}{field}={value}: {reason}")
