"""What a configuration targets in a model: its sites, and the base weights there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import _get_submodules
from peft.utils.other import TrainableTokensWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from tensorpeft.networks.update import AbstractUpdatableLinear, AbstractUpdate
from tensorpeft.plugin.base_weight import (
    as_matrix,
    check_reachable,
    find_backend,
    layer_shape,
    present,
    restore_row_order,
    with_layer,
)
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.experts import check_stacked_updates, target_stacks
from tensorpeft.plugin.kept_frames import take_frames
from tensorpeft.plugin.towers import find_tower
from tensorpeft.sites import Site, find_sites


def build_updates(
    tuner: BaseTuner,
    config: TensorConfig,
    prefix: str = "",  # as in `bases_of`
) -> Mapping[str, AbstractUpdate]:
    """The method's updates for all targets of a config, which is settled first. Changes nothing in the model."""
    sites, bases = bases_of(tuner, config, prefix)
    config.settle(sites, bases)
    updates = config.build(sites, replace(bases, allocates_only=_makes_empty_weights()))
    settle_order(config, sites, updates)
    check_stacked_updates(updates, bases.layers, config)
    take_frames(updates, config, {name: base for name, (base, _) in bases.layers.items()})
    return updates


def settle_order(config: TensorConfig, sites: Sequence[Site], updates: Mapping[str, AbstractUpdate]) -> None:
    """Write into the configuration in which order the weights are that updates with shared factors count.

    Raises:
        ValueError: it says another order of the same weights: the factors would go to one another's.
    """
    if all(update.shared is None for update in updates.values()):
        return
    order = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", site.name) for site in sites))
    known = config.site_order or []
    moved = next(((there, here) for there, here in zip(known, order) if there != here), None)
    if moved is not None and sorted(known) == sorted(order):
        raise ValueError(
            f"this adapter's factors count the weights in the order in which its model registers them: where it was "
            f"made, {moved[0]} comes before {moved[1]}; in this model it is the other way round, and each would get "
            "the other's update. Load it into the class of model that it was trained with, of the same version."
        )
    config.site_order = order


def _makes_empty_weights() -> bool:
    """Whether new parameters are made on the meta device, as PEFT does where a file has them (`low_cpu_mem_usage`)."""
    return nn.ParameterList([torch.empty(0)])[0].is_meta


def bases_of(
    tuner: BaseTuner,
    config: TensorConfig,
    prefix: str = "",  # what PEFT has before the names that it matches: PeftMixedModel walks from its own root
) -> tuple[list[Site], _Bases]:
    """All targets of a config, and what the model has there."""
    quantization = get_quantization_kwargs(tuner.model)
    layers: dict[str, tuple[nn.Module, Any]] = {}
    put_aside = dict[str, Tensor]()
    shapes = []
    for name in _target_names(tuner, config, prefix):
        parent, target, _ = _get_submodules(tuner.model, name)
        base = innermost(target)
        if isinstance(unmerged := getattr(target, "_unmerged", None), Tensor):
            put_aside[name] = unmerged
        backend = find_backend(base, **quantization)
        out, in_ = layer_shape(base, name, parent, backend, config.adapts_convolutions)
        check_reachable(base, name, tuner.model)
        layers[name] = (base, backend)
        shapes.append((name, out, in_))
    for stack in target_stacks(tuner.model, config, tuner._check_target_module_exists):
        for name, weight in stack.weights().items():
            layers[name] = (weight, None)
            shapes.append((name, weight.out_features, weight.in_features))
    sites = list[Site]()
    for name, out, in_ in shapes:
        tower, own_config = find_tower(tuner.model, name)
        (site,) = find_sites([(name, out, in_)], own_config, tower)
        sites.append(with_layer(site, layers[name][0]))
    return sites, _Bases(layers, put_aside)


@dataclass(frozen=True)
class _Bases:
    """What `TensorConfig.build` reads of the model. Layers by name, with PEFT's quantisation backend."""

    layers: Mapping[str, tuple[nn.Module, Any]]
    put_aside: Mapping[str, Tensor]  # the weights of those in which adapters are merged
    allocates_only: bool = False

    def read_weight(self, site: Site) -> Tensor:
        base, backend = self.layers[site.name]
        if self.allocates_only:
            return torch.empty(site.out, site.num_columns, device="meta")
        with present(base):
            restore_row_order(base)
            weight = base.weight.data if backend is None else backend.get_base_weight(base)
            weight = self.put_aside.get(site.name, weight)
            return as_matrix(base, weight)  # type: ignore[arg-type]

    def start(self, site: Site) -> nn.Module | None:
        base, _ = self.layers[site.name]
        return base.start if isinstance(base, AbstractUpdatableLinear) else None


def _target_names(tuner: BaseTuner, config: TensorConfig, prefix: str) -> list[str]:
    """The full names of the layers that PEFT is going to adapt for a config, in the model's order."""
    injected: set[str] | None = getattr(tuner, "_injected_names", None)
    is_target: Callable[[str], Any]
    is_target = partial(tuner._check_target_module_exists, config) if injected is None else injected.__contains__
    names: list[str] = []
    inside = None
    for name, module in tuner.model.named_modules():
        if inside is not None and name.startswith(inside):
            continue  # what lies in there, which comes right after it, belongs to an earlier adapter
        if name and is_target(f"{prefix}{name}"):
            names.append(name)
        inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
    return names


def check_tokens(model: nn.Module, config: TensorConfig) -> None:
    """Raise a `ValueError` unless `trainable_token_indices` names rows of embeddings or heads: PEFT finds out late."""
    if not config.trainable_token_indices:
        return
    named: Any = config.trainable_token_indices
    if not isinstance(named, dict):
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
        named = {key: named for key, module in model.named_modules() if module is embeddings}
    for name, tokens in named.items():
        for key, module in model.named_modules():
            if not key.endswith(name):  # PEFT's rule
                continue
            if not isinstance(module, (nn.Embedding, nn.Linear, TrainableTokensWrapper)):
                raise ValueError(
                    f"trainable_token_indices: {name!r} names {key}, a {type(module).__name__}; expected the name of "
                    "an embedding or a head, such as embed_tokens."
                )
            rows = len(module.weight)  # pyright: ignore[reportArgumentType]
            is_list = isinstance(tokens, (list, tuple)) and len(tokens) > 0
            if not is_list or not all(type(token) is int and 0 <= token < rows for token in tokens):
                raise ValueError(
                    f"trainable_token_indices={tokens!r} of {key}: expected a list of tokens, from 0 to {rows - 1}."
                )


def innermost(target: nn.Module) -> nn.Module:
    """The layer under all adapters."""
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
