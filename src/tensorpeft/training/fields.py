"""Values of a recipe against the types that the libraries' dataclasses declare, which these do not check themselves."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal, TypeGuard

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def check_types(given: Mapping[str, Any], of: type, what: str) -> None:
    """Refuse values that no type of a dataclass's field allows. "no" is a text, and true where it is taken for a bool.

    Raises:
        ValueError: names the field, the value and what is expected.
    """
    hints = typing.get_type_hints(of)
    for field in dataclasses.fields(of):
        if field.name in given and not _fits(given[field.name], hints[field.name]):
            expected = dict.fromkeys(_say(hint) for hint in _alternatives(hints[field.name]))
            raise ValueError(f"{what}.{field.name}={given[field.name]!r}: expected {', '.join(expected)}.")


def _alternatives(hint: Any) -> Sequence[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for each in typing.get_args(hint) for part in _alternatives(each)]
    return [hint]


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, alternative) for alternative in _alternatives(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return value in inner or isinstance(value, str)  # which text is the library's to say
    if origin in (list, tuple, set):
        parts = inner[:1] if origin in (list, set) else ()
        return isinstance(value, list | tuple) and all(_fits(item, part) for item in value for part in parts)
    if origin is dict or dataclasses.is_dataclass(origin):
        return isinstance(value, Mapping | origin)
    if origin in (int, float):
        whole = isinstance(value, int) or (isinstance(value, float) and (origin is float or value.is_integer()))
        return whole and not isinstance(value, bool)
    if isinstance(origin, type) and issubclass(origin, Enum):
        return isinstance(value, str | bool | origin)  # what it makes of true it says itself
    if origin is str:
        return isinstance(value, str | bool)  # of such a field some libraries take true, and do not declare it: fsdp
    return isinstance(value, origin) if origin in (bool, types.NoneType) else True


def _say(hint: Any) -> str:
    origin = typing.get_origin(hint) or hint
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if origin is types.NoneType:
        return "null"
    if origin in (list, tuple, set):
        return "a list"
    return _WORDS.get(origin, "a text" if isinstance(origin, type) and issubclass(origin, Enum) else "a mapping")


def is_whole(value: Any, at_least: int = 0) -> bool:
    """Whether a value is a whole number that is no smaller."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: Any, above: float = -math.inf) -> TypeGuard[float]:
    """Whether a value is a finite number that is larger."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > above
