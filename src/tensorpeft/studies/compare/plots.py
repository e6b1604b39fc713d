"""The figures of a comparison."""

import math
import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from tensorpeft.reports.figures import MARKERS, make_figure, plot_band, save_figure
from tensorpeft.reports.tables import spread
from tensorpeft.studies.compare.entries import Comparison
from tensorpeft.studies.compare.results import EntryResult, find_metrics, is_loss
from tensorpeft.studies.compare.table import target_loss, title
from tensorpeft.training.results import common_curves

# Sizes that differ by more than this factor are shown on a logarithmic axis.
_WIDE = 4


def plot_curves(comparison: Comparison, results: Sequence[EntryResult], path: Path) -> bool:
    """Write a PNG of the validation losses: lines at the seeds' means, bands from least to greatest; False: no curves.

    What lies far above all others (a run that diverged) is cut off.
    """
    drawn = [result for result in results if len(result.mean_curve()) > 1]
    if not drawn:
        return False
    figure, (axes,) = make_figure(9, 5)
    for marker, result in zip(cycle(MARKERS), drawn):
        label = f"{result.entry.label}, rate {result.rate:g}"
        plot_band(axes, *common_curves(result.finished, "eval_loss"), marker=marker, markersize=4, label=label)
    if (target := target_loss(comparison, results)) is not None:
        label = f"loss {target:.3f}, {'reached by all' if comparison.target_loss is None else 'asked for'}"
        axes.axhline(target, color="grey", linewidth=0.8, linestyle=":", label=label)
    starts = [result.mean_curve()[0][1] for result in drawn]
    if comparison.recipe.rewards is None:
        axes.set_ylim(top=min(max(starts), 2 * statistics.median(starts)) * 1.03)
    name = f"validation loss ({comparison.recipe.loss_unit})"
    axes.set(title=f"Validation loss: {title(comparison)}", xlabel="optimiser step", ylabel=name)
    axes.set_xlim(left=0)
    axes.legend(fontsize="small")
    save_figure(figure, path)
    return True


def plot_front(comparison: Comparison, results: Sequence[EntryResult], path: Path) -> bool:
    """Write a PNG of score, or validation loss, over trained parameters, with the front of the best; False: no points.

    A point per entry at the seeds' mean, a bar of one standard deviation. On the front are the entries that no smaller
    one equals.
    """
    metric = next(iter(find_metrics(results)), None)
    points = []
    for result in results:
        values = [value for value in (result.scores(*metric) if metric else result.losses()) if math.isfinite(value)]
        if result.costs is not None and result.costs.parameters and values:
            points.append((result.costs.parameters, statistics.fmean(values), spread(values), result.entry.label))
    if not points:
        return False
    lower_is_better = metric is None or is_loss(metric[1])
    figure, (axes,) = make_figure(9, 5)
    for marker, (size, mean, deviation, label) in zip(cycle(MARKERS), points):
        axes.errorbar(size, mean, yerr=deviation, marker=marker, capsize=3, label=label)
    front = _front([(size, mean) for size, mean, *_ in points], lower_is_better)
    axes.step(*zip(*front, strict=True), where="post", color="grey", linewidth=0.8, zorder=0, label="best up to a size")
    sizes = [size for size, *_ in points]
    if max(sizes) > _WIDE * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("trained parameters, the head apart")
    loss = f"validation loss ({comparison.recipe.loss_unit})"
    name = loss if metric is None else f"test {metric[1]} ({metric[0]})"
    axes.set_ylabel(f"{name}, {'lower' if lower_is_better else 'higher'} is better")
    axes.set_title(f"What parameters buy: {title(comparison)}")
    axes.grid(alpha=0.3, which="minor")
    # Beside the axes: points of equal size, which an equal-parameter comparison is made of, leave no room for labels.
    figure.legend(loc="outside right upper", fontsize="small")
    save_figure(figure, path)
    return True


def _front(points: Sequence[tuple[float, float]], lower_is_better: bool) -> list[tuple[float, float]]:
    """The (size, value) that no point of at most that size is better than, by size."""
    sign = 1 if lower_is_better else -1
    front: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * value < sign * front[-1][1]:
            front.append((size, value))
    return front
