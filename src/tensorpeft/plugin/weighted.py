"""A linear combination of adapters as one more adapter, where it has the adapters' own form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner

from tensorpeft.networks.update import AbstractSummableUpdate
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.kept_frames import updates_of
from tensorpeft.plugin.rollback import unchanged_on_error


@torch.no_grad()
def add_weighted_adapter(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Add the adapter whose updates are `Σ_k weights[k] · ΔW_k`: its rank is the sum of theirs. It is frozen.

    Exactly, in float32 (or float64): an adapter in half precision is widened first.

    Raises:
        ValueError: an adapter is unknown, adapts other layers, or trains modules in full; a name that is taken; numbers
            that do not match, or are not finite; a method whose adapters have no sum of their own form. Nothing has
            been changed.
    """
    names = list(adapters)
    _check_request(tuner.peft_config, names, weights, adapter_name)  # type: ignore[arg-type]
    updates = [updates_of(tuner.model, name) for name in names]
    for name, found in zip(names, updates):
        if found.keys() != updates[0].keys():
            other = sorted(found.keys() ^ updates[0].keys())[0]
            raise ValueError(
                f"{other}: only one of the adapters {names[0]!r} and {name!r} adapts this layer. Combine adapters of "
                "the same target_modules."
            )
    config: TensorConfig = tuner.peft_config[names[0]]  # type: ignore[assignment]
    method = config.registered_type.value
    firsts: list[Any] = [next(iter(found.values())) for found in updates]
    if not isinstance(firsts[0], AbstractSummableUpdate):
        raise ValueError(
            f"a weighted sum of {method} adapters is not one itself: only updates of low rank "
            "that share their factors have such a sum. Export each adapter as a LoRA (tensorpeft.export.to_lora) and "
            "combine those."
        )
    tensors = firsts[0].sum_shared(firsts[1:], weights)
    config = config.of_sum([tuner.peft_config[name] for name in names[1:]])
    config.inference_mode = True
    with unchanged_on_error(tuner):
        tuner.peft_config[adapter_name] = config
        tuner.inject_adapter(tuner.model, adapter_name)
        added = updates_of(tuner.model, adapter_name)
        assert added.keys() == updates[0].keys()
        next(iter(added.values())).shared.load_state_dict(tensors)  # type: ignore[union-attr]


def _check_request(
    configs: Mapping[str, TensorConfig], names: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    unknown = sorted(set(names) - set(configs))
    if unknown or not names or len(names) != len(weights):
        raise ValueError(
            f"adapters={list(names)}, weights={list(weights)}: expected one weight for each, and adapters of "
            f"{sorted(configs)}."
        )
    if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={list(weights)}: expected finite numbers.")
    if adapter_name in configs:
        raise ValueError(
            f"adapter_name={adapter_name!r}: there is an adapter of this name. Delete it, or pass another."
        )
    for name in names:
        if configs[name].modules_to_save or configs[name].trainable_token_indices:
            raise ValueError(
                f"{name}: this adapter trains modules in full (modules_to_save, trainable_token_indices), which have "
                "no weighted sum with the others' here. Combine adapters without any."
            )
