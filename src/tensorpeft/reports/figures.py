"""Figures in one style, written as PNG."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from tensorpeft.reports.files import write_whole
from tensorpeft.reports.tables import strip_controls

# One marker per curve: curves that lie on each other, or print in grey, can still be told apart.
MARKERS = "osD^vPX*<>hd"


def make_figure(
    width: float,  # inches
    height: float,
    count: int = 1,  # of axes
    columns: int = 1,  # of them in a row
) -> tuple[Figure, list[Axes]]:
    """A figure with axes that have a grid, in rows."""
    # A Figure of its own, without pyplot: no global state and no choice of a window system.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = [figure.add_subplot(-(-count // columns), columns, index + 1) for index in range(count)]
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure, axes


def plot_band(
    axes: Axes,
    x: Sequence[float],  # (points,)
    curves: Sequence[Sequence[float]],  # each (points,)
    center: Callable[[Sequence[float]], float] = statistics.fmean,
    **style: Any,  # of `Axes.plot`
) -> None:
    """Draw the centre of several curves as a line, and a band from the least to the greatest."""
    points = list(zip(*curves, strict=True))
    (line,) = axes.plot(x, [center(values) for values in points], **style)
    low, high = [min(values) for values in points], [max(values) for values in points]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def name_layers(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Give axes that stand above each other a place per layer, from 0 on, and write the names under the lowest."""
    for ax in axes:
        ax.set_xticks(range(len(names)), names if ax is axes[-1] else [""] * len(names))
    axes[-1].tick_params(axis="x", rotation=90, labelsize=7)
    axes[-1].set_xlabel("layer")


def legend_above(figure: Figure, title: str, columns: int = 3) -> None:
    """Put one legend, that of the first axes, and the title above all axes."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title=title, ncols=min(len(labels), columns), loc="outside upper center")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole; labels are shown as they are: a dollar is a dollar, not the start of a formula."""
    for text in figure.findobj(Text):
        text.set_text(strip_controls(text.get_text()))  # pyright: ignore[reportAttributeAccessIssue]
        text.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue]
    with write_whole(path) as unfinished:
        figure.savefig(unfinished, format="png")
