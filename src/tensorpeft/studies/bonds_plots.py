"""The figures of ``tensorpeft inspect MODEL``."""

import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from tensorpeft.reports.figures import MARKERS, legend_above, make_figure, name_layers, plot_band, save_figure
from tensorpeft.studies.bonds import RANKS, WeightStudy
from tensorpeft.studies.inspected_model import short_name

_NOISE = 1e-4  # singular values below it, over the largest, are not drawn: a Gram matrix resolves 1e-8


def by_kind(studies: Sequence[WeightStudy]) -> dict[str, list[WeightStudy]]:
    """The studies by kind of layer, in the model's order."""
    kinds: dict[str, list[WeightStudy]] = {}
    for study in studies:
        kinds.setdefault(study.kind, []).append(study)
    return kinds


def plot_spectra(studies: Sequence[WeightStudy], title: str, path: Path) -> None:
    """Write a PNG: the singular values of the matrices and of every unfolding, by kind of layer."""
    count = len(studies[0].energies)
    num_columns = min(count, 3)
    num_rows = -(-count // num_columns)
    figure, drawn = make_figure(4.2 * num_columns, 3.2 * num_rows + 1, count, num_columns)
    for index, axes in enumerate(drawn):
        for marker, (kind, members) in zip(cycle(MARKERS), by_kind(studies).items()):
            values = torch.stack([study.energies[index].sqrt() for study in members])
            values = values / values[:, :1].clamp_min(1e-300)
            style = {"marker": marker, "markersize": 4, "markevery": max(values.shape[1] // 8, 1)}
            plot_band(axes, range(1, values.shape[1] + 1), values.tolist(), statistics.median, label=kind, **style)
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, _NOISE), min(top, 1.3))
        # An unfolding's values span less than a decade: its ticks are minor ones, and 0.9 reads better than 9 · 10⁻¹.
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if bottom > 0.05 else NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("matrix" if index == 0 else f"unfolding {index}: after core {index}", fontsize=10)
        if index % num_columns == 0:
            axes.set_ylabel("singular value / largest")
        if index + num_columns >= count:
            axes.set_xlabel("index of the singular value")
    legend_above(figure, f"{title}: median and range over the layers")
    save_figure(figure, path)


def plot_errors(studies: Sequence[WeightStudy], title: str, path: Path) -> None:
    """Write a PNG: the truncation error over the largest bond, by kind of layer."""
    figure, (axes,) = make_figure(8, 5.4)
    for marker, (kind, members) in zip(cycle(MARKERS), by_kind(studies).items()):
        errors = [[100 * study.errors[rank] for rank in RANKS] for study in members]
        plot_band(axes, RANKS, errors, statistics.median, marker=marker, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="largest bond R", ylabel="relative error of the weight, ‖W − MPO‖ / ‖W‖ (%)", ylim=(0, None))
    legend_above(figure, f"{title}: median and range over the layers")
    save_figure(figure, path)


def plot_bonds(studies: Sequence[WeightStudy], title: str, path: Path) -> None:
    """Write a PNG: error and parameters of every layer, with uniform and with adaptive bonds, and the SVD's error."""
    figure, drawn = make_figure(max(8.0, 0.24 * len(studies) + 3), 7.6, count=2)
    # Rings and small marks: where two values are one, both are seen.
    forms = (
        ("uniform", "uniform bonds", {"marker": "o", "markersize": 8, "fillstyle": "none"}),
        ("adaptive", "adaptive bonds", {"marker": "s", "markersize": 4}),
        ("svd", "SVD of equal size", {"marker": "D", "markersize": 4}),
    )
    panels = (("error", 100, "relative error of the weight (%)"), ("size", 1, "parameters"))
    for index, (axes, (field, scale, label)) in enumerate(zip(drawn, panels)):
        for form, name, style in forms[: 3 - index]:
            values = [scale * getattr(getattr(study, form), field) for study in studies]
            axes.plot(values, ls="", label=name, clip_on=False, zorder=3, **style)
        axes.set(ylabel=label, ylim=(0, None))
    name_layers(drawn, [short_name(study.name) for study in studies])
    drawn[-1].yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    legend_above(figure, title)
    save_figure(figure, path)
