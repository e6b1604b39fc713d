"""The figures of ``tensorpeft inspect MODEL``."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from tensorpeft.studies.bonds import RANKS, WeightStudy
from tensorpeft.studies.inspected_model import short_name

# One marker per kind: curves that lie on each other, or print in grey, can still be told apart.
_MARKERS = "osD^vPX*"
_NOISE = 1e-4  # singular values below it, over the largest, are not drawn: a Gram matrix resolves 1e-8


def _by_kind(studies: Sequence[WeightStudy]) -> dict[str, list[WeightStudy]]:
    kinds: dict[str, list[WeightStudy]] = {}
    for study in studies:
        kinds.setdefault(study.kind, []).append(study)
    return kinds


def plot_spectra(studies: Sequence[WeightStudy], title: str, path: Path) -> None:
    """Write a PNG: the singular values of the matrices and of every unfolding, by kind of layer."""
    # A Figure of its own, without pyplot: no global state and no choice of a window system.
    count = len(studies[0].energies)
    num_columns = min(count, 3)
    num_rows = -(-count // num_columns)
    figure = Figure(figsize=(4.2 * num_columns, 3.2 * num_rows + 1), dpi=150, layout="constrained")
    for index in range(count):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        for marker, (kind, members) in zip(_MARKERS * len(studies), _by_kind(studies).items()):
            values = torch.stack([study.energies[index].sqrt() for study in members])
            values = values / values[:, :1].clamp_min(1e-300)
            places = range(1, values.shape[1] + 1)
            every = max(values.shape[1] // 8, 1)
            (line,) = axes.plot(
                places, values.median(0).values, marker, ls="-", label=kind, markersize=4, markevery=every
            )
            axes.fill_between(
                places, values.min(0).values, values.max(0).values, color=line.get_color(), alpha=0.15, linewidth=0
            )
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, _NOISE), min(top, 1.3))
        # An unfolding's values span less than a decade: its ticks are minor ones, and 0.9 reads better than 9 · 10⁻¹.
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if bottom > 0.05 else NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.set_title("matrix" if index == 0 else f"unfolding {index}: after core {index}", fontsize=10)
        if index % num_columns == 0:
            axes.set_ylabel("singular value / largest")
        if index + num_columns >= count:
            axes.set_xlabel("index of the singular value")
    _legend(figure, f"{title}: median and range over the layers")
    figure.savefig(path)


def plot_errors(studies: Sequence[WeightStudy], title: str, path: Path) -> None:
    """Write a PNG: the truncation error over the largest bond, by kind of layer."""
    figure = Figure(figsize=(8, 5.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for marker, (kind, members) in zip(_MARKERS * len(studies), _by_kind(studies).items()):
        errors = torch.tensor([[100 * study.errors[rank] for rank in RANKS] for study in members])
        (line,) = axes.plot(RANKS, errors.median(0).values, marker, ls="-", label=kind)
        axes.fill_between(
            RANKS, errors.min(0).values, errors.max(0).values, color=line.get_color(), alpha=0.15, linewidth=0
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("largest bond R")
    axes.set_ylabel("relative error of the weight, ‖W − MPO‖ / ‖W‖ (%)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    _legend(figure, f"{title}: median and range over the layers")
    figure.savefig(path)


def plot_bonds(studies: Sequence[WeightStudy], title: str, path: Path) -> None:
    """Write a PNG: error and parameters of every layer, with uniform and with adaptive bonds, and the SVD's error."""
    figure = Figure(figsize=(max(8.0, 0.24 * len(studies) + 3), 7.6), dpi=150, layout="constrained")
    # Rings and small marks: where two values are one, both are seen.
    forms = (
        ("uniform", "uniform bonds", {"marker": "o", "markersize": 8, "fillstyle": "none"}),
        ("adaptive", "adaptive bonds", {"marker": "s", "markersize": 4}),
        ("svd", "SVD of equal size", {"marker": "D", "markersize": 4}),
    )
    panels = (("error", 100, "relative error of the weight (%)"), ("size", 1, "parameters"))
    for index, (field, scale, label) in enumerate(panels):
        axes = figure.add_subplot(2, 1, index + 1)
        for form, name, style in forms[: 3 - index]:
            values = [scale * getattr(getattr(study, form), field) for study in studies]
            axes.plot(values, ls="", label=name, clip_on=False, zorder=3, **style)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        names = [short_name(study.name) for study in studies] if index else []
        axes.set_xticks(range(len(studies)), names)
        axes.tick_params(axis="x", rotation=90, labelsize=7)
    axes = figure.axes[-1]
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("layer")
    _legend(figure, title)
    figure.savefig(path)


def _legend(figure: Figure, title: str) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title=title, ncols=min(len(labels), 3), loc="outside upper center")
