"""Numbers of trained parameters: as a person writes them, and the value of a method's knob that comes closest."""

import re
from bisect import bisect_left
from collections.abc import Callable

_LARGEST = 2**14


def parse_count(text: str) -> int:
    """The number of `1M`, `50k` or `120000` parameters.

    Raises:
        ValueError: not such a number.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbB]?)\s*", text)
    count = (
        0 if match is None else round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])
    )
    if count < 1:
        raise ValueError(f"--budget {text}: expected a number of parameters, such as 1M or 50k.")
    return count


def closest_value(
    count: Callable[[int], int],  # trained parameters at a value of the knob; grows with it
    budget: int,
) -> int:
    """The value from 1 whose count is closest to the budget.

    >>> closest_value(lambda r: 100 * r, 1234)
    12
    """
    high = 2
    while count(high) < budget and high < _LARGEST:
        high *= 2
    above = bisect_left(range(high), budget, lo=high // 2, key=count)
    return min((max(above - 1, 1), above), key=lambda value: abs(count(value) - budget))
