"""Small grids of learning rates."""

from collections.abc import Sequence
from math import log10

_SAME = 0.06  # powers of ten


def rate_grid(
    center: float,
    num_rates: int = 3,
) -> tuple[float, ...]:  # ascending
    """Rates half a power of ten apart around a centre, rounded to 1 or 3 times a power of ten.

    >>> rate_grid(0.0028)
    (0.001, 0.003, 0.01)
    """
    first = round(2 * log10(center)) - num_rates // 2
    return tuple(float(f"{10 ** ((first + k) / 2):.0e}") for k in range(num_rates))


def rates_beyond(
    rates: Sequence[float],  # those tried, at least two
    best: float,
) -> list[float]:
    """The next rate beyond an edge of the grid, spaced as the grid is there, where ``best`` is that edge; else none."""
    grid = sorted(rates)
    if best == grid[0]:
        return [_rounded(grid[0] ** 2 / grid[1])]
    return [_rounded(grid[-1] ** 2 / grid[-2])] if best == grid[-1] else []


def _rounded(rate: float) -> float:
    """1 or 3 times a power of ten where that is what is meant: 3e-4 for the 3.33e-4 below 1e-3 and 3e-3."""
    (nearest,) = rate_grid(rate, 1)
    return nearest if abs(log10(rate / nearest)) < _SAME else rate
