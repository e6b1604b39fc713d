"""Small grids of learning rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, log10

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


@dataclass(frozen=True)
class RateWindow:
    """The learning rates around the best one at which the loss is hardly worse.

    Args:
        low: its lower end.
        high: its upper end.
        low_is_open: whether the lower end is the lowest rate that was tried: it may go on below.
        high_is_open: whether the upper end is the highest one.
    """

    low: float
    high: float
    low_is_open: bool
    high_is_open: bool

    @property
    def factor(self) -> float:
        """How wide it is; at least so wide where an end is open."""
        return self.high / self.low


def rate_window(
    losses: Sequence[tuple[float, float]],  # (rate, loss), ascending by rate; infinite where a run failed
    within: float = 0.02,  # above the lowest loss, in its unit
) -> RateWindow | None:
    """The rates around the best one whose loss is at most ``within`` above its loss; None: no run has a loss.

    Between two rates that were tried the loss is taken to be the straight line over the rate's logarithm; where it is
    convex, as it is around its minimum, it lies below that line, and the window is wider than what is told.

    >>> window = rate_window([(1e-4, 1.04), (1e-3, 1.0), (1e-2, 1.2)])
    >>> f"{window.low:.2g} to {window.high:.2g}"
    '0.00032 to 0.0013'
    """
    best = min(range(len(losses)), key=lambda index: losses[index][1], default=None)
    if best is None or not isfinite(losses[best][1]):
        return None
    limit = losses[best][1] + within
    low, low_is_open = _reach(losses[best::-1], limit)
    high, high_is_open = _reach(losses[best:], limit)
    return RateWindow(low, high, low_is_open, high_is_open)


def _reach(
    losses: Sequence[tuple[float, float]],  # from the best one outwards
    limit: float,
) -> tuple[float, bool]:
    """The rate at which the loss first comes to its limit, and whether it never does."""
    for (rate, loss), (next_rate, next_loss) in pairwise(losses):
        if next_loss > limit:
            share = (limit - loss) / (next_loss - loss)  # 0 beside a run that failed
            return rate * (next_rate / rate) ** share, False
    return losses[-1][0], True


def _rounded(rate: float) -> float:
    """1 or 3 times a power of ten where that is what is meant: 3e-4 for the 3.33e-4 below 1e-3 and 3e-3."""
    (nearest,) = rate_grid(rate, 1)
    return nearest if abs(log10(rate / nearest)) < _SAME else rate
