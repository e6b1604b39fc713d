"""A value that some layers override by name, as in PEFT's `rank_pattern`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from peft.utils.other import get_pattern_key

Value = TypeVar("Value")


def value_for(name: str, patterns: Mapping[str, Value], default: Value) -> Value:
    """The value of the pattern that matches a layer's full name, or the default."""
    return patterns.get(get_pattern_key(list(patterns), name), default)
