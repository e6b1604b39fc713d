"""After an error, a model is what it was before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged_on_error(
    model: nn.Module,
    is_ours: Callable[[], bool] = lambda: True,  # asked after an error: whether to undo what was done until then
) -> Iterator[None]:
    """Put a model's modules, attributes and flags back if what runs inside fails.

    Of every module, what it refers to is noted, not the numbers: for work that replaces and adds, and writes into no
    tensor that is there.
    """
    states = [_note(vars(module)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if is_ours():
            for container, content in (noted for state in states for noted in state):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
            for parameter, flag in flags:
                if parameter.requires_grad != flag:
                    parameter.requires_grad = flag
        raise


def _note(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    """A module's attributes, and those of them that hold others, each with a copy of what is in it."""
    containers = [attributes, *(value for value in attributes.values() if isinstance(value, (dict, list, set)))]
    return [(container, copy.copy(container)) for container in containers]
