"""The route of a forward, row by row of its table, and that a layer goes it."""

from itertools import product

import pytest
import torch
from peft import get_peft_model
from torch import nn

from cases import MODELS, Case, over_cases, tokens
from tensorpeft.networks.update import AbstractFusedUpdate, AbstractLowRankUpdate
from tensorpeft.plugin.layer import TensorLayer
from tensorpeft.plugin.routes import Route, choose_route

FACTS = ("is_addable", "is_updatable", "has_fused", "has_low_rank", "may_keep", "is_cheaper_apart")
YES, NO, ANY = (True,), (False,), (False, True)
# Every combination of facts is in exactly one row.
TABLE = [
    # addable, updatable, fused, low rank, keep, cheaper apart
    ((NO, NO, ANY, ANY, ANY, ANY), Route.BASE),  # the weight cannot be read: its layer is called
    ((NO, YES, NO, ANY, ANY, ANY), Route.BASE),
    ((NO, YES, YES, ANY, ANY, NO), Route.UPDATABLE),
    ((NO, YES, YES, ANY, ANY, YES), Route.BASE),  # nothing is kept of what is no plain matrix
    ((YES, NO, NO, NO, ANY, ANY), Route.BASE),
    ((YES, NO, NO, YES, ANY, ANY), Route.LOW_RANK),
    ((YES, NO, YES, ANY, YES, ANY), Route.KEPT_SUM),  # a sum that is there costs nothing
    ((YES, NO, YES, ANY, NO, NO), Route.SUM),
    ((YES, NO, YES, NO, NO, YES), Route.BASE),
    ((YES, NO, YES, YES, NO, YES), Route.LOW_RANK),
    # No layer is both: a plain matrix, and stored in another form.
    ((YES, YES, NO, NO, ANY, ANY), Route.BASE),
    ((YES, YES, NO, YES, ANY, ANY), Route.LOW_RANK),
    ((YES, YES, YES, ANY, YES, ANY), Route.UPDATABLE),
    ((YES, YES, YES, ANY, NO, NO), Route.UPDATABLE),
    ((YES, YES, YES, NO, NO, YES), Route.BASE),
    ((YES, YES, YES, YES, NO, YES), Route.LOW_RANK),
]


@pytest.mark.parametrize(("facts", "route"), TABLE)
def test_route(facts: tuple[tuple[bool, ...], ...], route: Route):
    for values in product(*facts):
        assert choose_route(**dict(zip(FACTS, values, strict=True))) is route, values


def test_the_table_is_complete():
    rows = [values for facts, _ in TABLE for values in product(*facts)]
    assert sorted(rows) == sorted(product(ANY, repeat=len(FACTS)))


def adapted_layers(model: nn.Module) -> list[TensorLayer]:
    return [module for module in model.modules() if isinstance(module, TensorLayer)]


def routes_taken(model: nn.Module, monkeypatch) -> set[Route]:
    taken = set()

    def watch(**facts: bool) -> Route:
        taken.add(route := choose_route(**facts))
        return route

    monkeypatch.setattr("tensorpeft.plugin.layer.choose_route", watch)
    model(input_ids=tokens())
    return taken


@over_cases
def test_a_layer_goes_the_route_of_its_updates(case: Case, monkeypatch):
    model = get_peft_model(MODELS[0].fresh(), case.make(target_modules=MODELS[0].targets)).eval()
    updates = [layer.updates["default"] for layer in adapted_layers(model)]
    is_fused = isinstance(updates[0], AbstractFusedUpdate)
    apart = Route.LOW_RANK if isinstance(updates[0], AbstractLowRankUpdate) else Route.BASE
    with torch.no_grad():
        assert routes_taken(model, monkeypatch) == {Route.KEPT_SUM if is_fused else apart}
    if is_fused:
        rows = tokens().numel()
        expected = {apart if update.is_cheaper_apart(rows) else Route.SUM for update in updates}
    else:
        expected = {apart}
    assert routes_taken(model.train(), monkeypatch) == expected
    with model.disable_adapter():
        assert routes_taken(model, monkeypatch) == {Route.BASE}
    for layer in adapted_layers(model):  # as offloading does
        layer.base_layer.register_forward_hook(lambda *_: None)
    assert routes_taken(model, monkeypatch) == {Route.BASE}
