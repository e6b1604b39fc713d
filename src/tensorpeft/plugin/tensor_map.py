"""Which weights form which tensor, before anything is trained or changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.integrations import init_empty_weights
from torch import nn

from tensorpeft.networks.update import AbstractUpdate
from tensorpeft.plugin.config import Bases, TensorConfig
from tensorpeft.plugin.targets import bases_of, build_updates
from tensorpeft.plugin.tuner import TensorModel
from tensorpeft.sites import Site


@dataclass(frozen=True)
class TensorMap:
    """What an adapter will be on a model.

    Args:
        tensors: description of a tensor (its modes) -> full names of the weights in it, or, for methods with a network
            per weight, of the weights that have one of these modes.
        num_tensors: how many there are: one per description, or one per weight.
        num_parameters: trainable parameters of the adapter.
    """

    tensors: dict[str, list[str]]
    num_tensors: int
    num_parameters: int


def tensor_map(model: nn.Module, config: TensorConfig) -> TensorMap:
    """The tensors that `get_peft_model(model, config)` would make. Changes nothing, and reads no weight but for shapes
    that depend on them (`DotaConfig(r="auto")`).

    Raises:
        ValueError: as `get_peft_model` would: no target, or one that the method cannot serve.
    """
    updates = plan_updates(model, config)
    tensors: dict[str, list[str]] = {}
    for name, update in updates.items():
        tensors.setdefault(update.tensor_name(), []).append(name)
    modules = {id(module): module for update in updates.values() for module in (update, update.shared) if module}
    num_tensors = len(tensors) if any(update.shared for update in updates.values()) else len(updates)
    return TensorMap(tensors, num_tensors, sum(p.numel() for module in modules.values() for p in module.parameters()))


def plan_updates(model: nn.Module, config: TensorConfig) -> Mapping[str, AbstractUpdate]:
    """The updates that `get_peft_model(model, config)` would make, by the names of their weights, without numbers.

    Raises:
        ValueError: see `tensor_map`.
    """
    with init_empty_weights(include_buffers=False):
        updates = build_updates(*_planning(model, config))
    if not updates:
        raise ValueError(f"no layer of the model matches target_modules={config.target_modules!r}.")
    return updates


def settle(
    model: nn.Module,
    config: TensorConfig,
    read_weights: Callable[[Sequence[Site]], Bases] | None = None,  # of a model on the meta device; None: the model's
) -> None:
    """Write into `config` what its shapes take from the model's weights, as `get_peft_model(model, config)` would.

    Raises:
        ValueError: see `tensor_map`.
    """
    sites, bases = bases_of(*_planning(model, config))
    config.settle(sites, bases if read_weights is None else read_weights(sites))


def _planning(model: nn.Module, config: TensorConfig) -> tuple[Any, TensorConfig]:
    """What of a tuner finding its targets takes, and a copy of the configuration with its targets."""
    tuner_cls: type[TensorModel] = PEFT_TYPE_TO_TUNER_MAPPING[config.registered_type]  # type: ignore[assignment]
    tuner: Any = SimpleNamespace(
        model=model,
        target_module_mapping=tuner_cls.target_module_mapping,
        _check_target_module_exists=tuner_cls._check_target_module_exists,
    )
    config = tuner_cls._prepare_adapter_config(tuner, copy.deepcopy(config), tuner_cls.get_model_config(model))  # type: ignore[assignment]
    return tuner, _maybe_include_all_linear_layers(config, model)  # type: ignore[return-value]


def print_tensor_map(model: nn.Module, config: TensorConfig) -> None:
    """Print which weights of a model form which tensor of an adapter, with which modes.

    Raises:
        ValueError: see `tensor_map`.

    >>> from transformers import BertConfig, BertModel
    >>> from tensorpeft import LortaConfig
    >>> print_tensor_map(BertModel(BertConfig()), LortaConfig(r=4, target_modules=["query", "value"]))
    LORTA: 1 tensor, 24 weights, 3,432 trainable parameters
    attention: A 768 · B 64 · C_H 12 · C_L 12 · C_M 2
        encoder.layer.{0…11}.attention.self.query
        encoder.layer.{0…11}.attention.self.value
    """
    found = tensor_map(model, config)
    count = sum(map(len, found.tensors.values()))
    tensors = f"{found.num_tensors} tensor{'' if found.num_tensors == 1 else 's'}"
    print(f"{config.registered_type.value}: {tensors}, {count} weights, {found.num_parameters:,} trainable parameters")
    for description, names in found.tensors.items():
        print(description)
        for line in _compress(names):
            print(f"    {line}")


def _compress(names: list[str]) -> list[str]:
    """The names, those that differ in one number as one."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        stem = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        numbers.setdefault(stem, []).extend([] if number is None else [int(number.group())])
    return [stem.format(_ranges(found)) if found else stem for stem, found in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    """`{0…11}`, `{0…3,8}`, or `5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}…{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"
