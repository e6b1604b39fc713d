"""``tensorpeft inspect quantization``: what 4 bits cost every layer of a model, as a table, a plot and JSON."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tensorpeft import DotaConfig
from tensorpeft.quantization.errors import LayerErrors, method_names, quantization_errors
from tensorpeft.reports.tables import TABLE_WIDTH, markdown_table
from tensorpeft.studies.inspected_model import load_batch, load_network, short_name

_MARKERS = "osD^v"


def inspect_quantization(
    model: str,  # folder or Hub name
    config: DotaConfig,
    rounds: int,
    output: Path,  # folder, made where it does not exist
    text: Path | None = None,  # a text per line; None: docstrings of Python's standard library
    double_quant: bool = True,
) -> list[LayerErrors]:
    """The errors of every layer, after printing their table and writing quantization.json, .md and .png.

    Raises:
        ValueError: no text, or what `quantization_errors` raises.
    """
    network, batch = load_network(model), load_batch(model, text)
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("layers", total=None)
        errors = quantization_errors(
            network,
            config,
            rounds,
            double_quant,
            lambda: network(**batch),
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    output.mkdir(parents=True, exist_ok=True)
    found = {
        "model": model,
        "r": config.r,
        "num_cores": config.num_cores,
        "rounds": rounds,
        "double_quant": double_quant,
    }
    found["layers"] = [dataclasses.asdict(layer) for layer in errors]
    (output / "quantization.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (output / "quantization.md").write_text(markdown(errors, rounds), encoding="utf-8")
    plot(
        errors,
        rounds,
        f"{'/'.join(Path(model).parts[-2:])}: NF4, bond {config.r}, {config.num_cores} cores",
        output / "quantization.png",
    )
    # A pipe counts as 80 columns and a window may be smaller: better wrapped lines than numbers that are cut.
    wide = Console(width=max(console.width, TABLE_WIDTH))
    wide.print(_table(errors, rounds))
    wide.print(f"Table, plot and raw results: {output}", soft_wrap=True)
    return errors


def _cells(errors: Sequence[LayerErrors], rounds: int) -> tuple[list[str], list[list[str]]]:
    names = method_names(rounds)
    columns = [
        f"{name}\n{part}" if " " in name else f"{name}\n\n{part}" for part in ("weight", "output") for name in names
    ]
    headers = ["layer", "SVD\nrank", *(column.replace(" ", "\n") for column in columns)]
    rows = []
    for layer in errors:
        best_svd = min(value for name, value in layer.weight.items() if name.startswith("QPiSSA"))
        best_mpo = min(value for name, value in layer.weight.items() if name.startswith("QDoTA"))
        # The reader looks for layers where the network is the wrong choice.
        mark = "" if best_mpo < best_svd else " ·" if best_mpo < layer.weight["QLoRA"] else " !"
        cells = [f"{100 * layer.weight[name]:.2f}" for name in names]
        cells += [f"{100 * layer.output[name]:.2f}" if layer.output else "" for name in names]
        rows.append([short_name(layer.name) + mark, str(layer.svd_rank), *cells])
    means = [f"{100 * statistics.fmean(layer.weight[name] for layer in errors):.2f}" for name in names]
    means += [
        f"{100 * statistics.fmean(layer.output[name] for layer in errors):.2f}" if errors[0].output else ""
        for name in names
    ]
    rows.append(["mean", "", *means])
    return headers, rows


def _legend(errors: Sequence[LayerErrors], rounds: int) -> list[str]:
    below = {
        name: sum(layer.weight[name] < layer.weight["QLoRA"] for layer in errors) for name in method_names(rounds)[1:]
    }
    counts = ", ".join(f"{name} in {count}" for name, count in below.items())
    return [
        "Relative error × 100 of the 4-bit weight with the start of its adapter, and of the layer's output on text.",
        f"SVD rank: of QPiSSA, whose two factors then have about as many elements as the MPO's cores. Rounds: 1 or "
        f"{rounds}.",
        f"Weight error below QLoRA's, of {len(errors)} layers: {counts}.",
        "·: an SVD of equal size keeps more than the MPO here. !: the MPO is no better than QLoRA here.",
    ]


def _table(errors: Sequence[LayerErrors], rounds: int) -> Table:
    headers, rows = _cells(errors, rounds)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        caption="\n".join(_legend(errors, rounds)),
        caption_justify="left",
    )
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(errors: Sequence[LayerErrors], rounds: int) -> str:
    """The table and its legend."""
    headers, rows = _cells(errors, rounds)
    return markdown_table(headers, rows) + "\n\n" + "\n".join(_legend(errors, rounds)) + "\n"


def plot(errors: Sequence[LayerErrors], rounds: int, title: str, path: Path) -> None:
    """Write a PNG: the error of every layer's weight, and of its output, by method."""
    panels = ["weight", "output"] if errors[0].output else ["weight"]
    figure = Figure(figsize=(max(8.0, 0.22 * len(errors) + 3), 3.6 * len(panels) + 1), dpi=150, layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, index + 1)
        for name, marker in zip(method_names(rounds), _MARKERS):
            axes.plot([100 * getattr(layer, panel)[name] for layer in errors], marker, label=_label(name), markersize=5)
        axes.set_ylabel(f"relative error of the {panel} (%)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.set_xticks(
            range(len(errors)), [short_name(layer.name) for layer in errors] if index == len(panels) - 1 else []
        )
        axes.tick_params(axis="x", rotation=90, labelsize=7)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title=title, ncols=len(labels), loc="outside upper center")
    figure.axes[-1].set_xlabel("layer")
    figure.savefig(path)


def _label(name: str) -> str:
    method, _, count = name.partition(" ")
    return name if not count else f"{method}, {count} round{'' if count == '1' else 's'}"
