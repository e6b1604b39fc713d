"""Many adapters in one batch: factors gathered per row give what each adapter gives alone, however they differ."""

import functools
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import get_peft_model

from cases import CASES, MODELS, Case, Model, logits, over_models, perturb, tokens
from tensorpeft.networks.update import AbstractLowRankUpdate, stacked_factors
from tensorpeft.plugin.config import own_fields
from tensorpeft.plugin.tensor_map import plan_updates

LLAMA = MODELS[0]
NAMES = ["default", "b", "c", "d", "e"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # of float32 logits of order one


def is_low_rank(case: Case) -> bool:
    updates = plan_updates(LLAMA.fresh(), case.make(target_modules=LLAMA.targets))
    return all(isinstance(update, AbstractLowRankUpdate) for update in updates.values())


LOW_RANK = [case for case in CASES if is_low_rank(case)]
over_low_rank = pytest.mark.parametrize("case", LOW_RANK, ids=lambda case: case.name)


@functools.cache
def field_types(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def five_values(case: Case, field: str) -> list[Any] | None:
    """Values of a field, as different as it allows, the case's own first; None for one that is no plain value."""
    kind, own = field_types(case.config)[field], getattr(case.make(), field)
    if get_origin(kind) is Literal:
        choices = [own, *(choice for choice in get_args(kind) if choice != own)]
        return [choices[k % len(choices)] for k in range(5)]
    if kind is bool:
        return [own, not own, own, not own, own]
    if type(own) is int:
        return [own + k for k in range(5)]
    return [own * factor for factor in (1.0, 0.25, 2.0, 3.0, 0.5)] if kind is float else None


DIFFERENT = [
    pytest.param(case, field, values, id=f"{case.name}-{field}")
    for case in LOW_RANK
    for field in own_fields(case.make())
    if (values := five_values(case, field)) is not None
]


def with_adapters(model: Model, case: Case, settings: list[dict[str, Any]]):
    """A model with five adapters of one method, all trained, each with its own settings."""
    configs = [case.make(target_modules=model.targets, task_type=model.task_type, **more) for more in settings]
    peft_model = get_peft_model(model.fresh(), configs[0]).eval()
    for name, config in zip(NAMES[1:], configs[1:], strict=True):
        peft_model.add_adapter(name, config)
    for seed, name in enumerate(NAMES):
        peft_model.set_adapter(name)
        perturb(peft_model, seed)
    return peft_model


def with_five_adapters(model: Model, case: Case):
    return with_adapters(model, case, [{}] * 5)


def updates_of_a_layer(peft_model, names: list[str]) -> list[AbstractLowRankUpdate]:
    layer = next(module for module in peft_model.modules() if hasattr(module, "base_layer"))
    return [layer.updates[name] for name in names]


def mixed_and_alone(peft_model, rows: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each row's logits in the mixed batch and with its adapter alone."""
    inputs = tokens(batch=len(rows))
    mixed = logits(peft_model, inputs, adapter_names=rows)
    alone = []
    for k, name in enumerate(rows):
        if name == "__base__":
            with peft_model.disable_adapter():
                alone.append(logits(peft_model, inputs[k : k + 1]))
        else:
            peft_model.set_adapter(name)
            alone.append(logits(peft_model, inputs[k : k + 1]))
    return list(zip(mixed.split(1), alone, strict=True))


@over_models
@over_low_rank
def test_rows_of_five_adapters_and_the_base(model: Model, case: Case):
    peft_model = with_five_adapters(model, case)
    assert stacked_factors(updates_of_a_layer(peft_model, NAMES)) is not None
    for found, expected in mixed_and_alone(peft_model, ["c", "__base__", "default", "e", "b", "c", "d"]):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(("case", "field", "values"), DIFFERENT)
def test_rows_of_adapters_that_are_configured_differently(case: Case, field: str, values: list[Any]):
    peft_model = with_adapters(LLAMA, case, [{field: value} for value in values])
    for found, expected in mixed_and_alone(peft_model, NAMES):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_every_number_of_every_low_rank_configuration_differs_somewhere():
    asked = {(param.values[0].name, param.values[1]) for param in DIFFERENT}
    for case in LOW_RANK:
        config = case.make()
        numbers = [name for name in own_fields(config) if type(getattr(config, name)) in (int, float)]
        assert numbers
        assert {(case.name, name) for name in numbers} <= asked


def test_a_changed_factor_is_seen():
    peft_model = with_five_adapters(LLAMA, LOW_RANK[0])
    inputs = tokens(batch=5)
    before = logits(peft_model, inputs, adapter_names=NAMES)
    peft_model.set_adapter("c")
    perturb(peft_model, seed=11)
    after = logits(peft_model, inputs, adapter_names=NAMES)
    changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert changed == [False, False, True, False, False]


@over_low_rank
def test_adapters_of_different_ranks_are_not_stacked(case: Case):
    peft_model = with_five_adapters(LLAMA, case)
    peft_model.add_adapter("f", case.make(target_modules=LLAMA.targets, r=2))
    updates = updates_of_a_layer(peft_model, ["default", "f"])
    assert all(isinstance(update, AbstractLowRankUpdate) for update in updates)
    assert stacked_factors(updates) is None
    assert logits(peft_model, tokens(batch=6), adapter_names=[*NAMES, "f"]).isfinite().all()
