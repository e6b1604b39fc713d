"""Which way an adapted layer's output is computed: decided in one place, from plain facts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum, auto

_keeps_sums: ContextVar[bool] = ContextVar("_keeps_sums", default=True)


class Route(Enum):
    """What is computed together with the base layer; every other update is added to what comes out."""

    BASE = auto()  # nothing: the base layer's own forward runs
    LOW_RANK = auto()  # the low-rank updates, in one map with the base weight
    SUM = auto()  # the fused updates, in one product with the sum of the weight and them, made for this call
    KEPT_SUM = auto()  # the same, with a sum that is kept
    UPDATABLE = auto()  # the fused updates, by the base layer, which adds updates by itself


@contextmanager
def without_kept_sums() -> Iterator[None]:
    """Sums are made for each call, one at a time: while a model is trained its memory has no room for all of them."""
    token = _keeps_sums.set(False)
    try:
        yield
    finally:
        _keeps_sums.reset(token)


def keeps_sums() -> bool:
    """Whether sums of weights and updates may be kept."""
    return _keeps_sums.get()


def choose_route(
    *,
    is_addable: bool,
    is_updatable: bool,
    has_fused: bool,
    has_low_rank: bool,
    may_keep: bool,
    is_cheaper_apart: bool,
) -> Route:
    """The route of one call.

    Args:
        is_addable: whether the base layer is a product with a plain weight that can be read, and no more.
        is_updatable: whether it stores its weight in another form, and adds updates by itself.
        has_fused: whether a fused update is active.
        has_low_rank: whether a low-rank update is.
        may_keep: whether a sum may be kept: nothing is trained or compiled, nobody else writes to the weight, it is
            whole between calls too, and the caller does not forbid it.
        is_cheaper_apart: whether every fused update is cheaper beside the base than in a sum made for this call.
    """
    is_kept = may_keep and is_addable and keeps_sums()
    if has_fused and (is_addable or is_updatable) and (is_kept or not is_cheaper_apart):
        if is_updatable:
            return Route.UPDATABLE
        return Route.KEPT_SUM if is_kept else Route.SUM
    return Route.LOW_RANK if has_low_rank and is_addable else Route.BASE
