"""``tensorpeft inspect quantization``: what 4 bits cost every layer of a model, as a table, a plot and JSON."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tensorpeft import DotaConfig
from tensorpeft.loading.models import load_as_saved
from tensorpeft.quantization.errors import LayerErrors, method_names, quantization_errors
from tensorpeft.reports.figures import MARKERS, legend_above, make_figure, name_layers, save_figure
from tensorpeft.reports.files import write_json, write_lines
from tensorpeft.reports.folders import sole_writer
from tensorpeft.reports.tables import Table, markdown_tables, model_title
from tensorpeft.reports.terminal import counting, print_table, say
from tensorpeft.studies.inspected_model import load_batch, short_name


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
        BlockingIOError: another inspection writes to the output folder.
        ValueError: no text, or what `quantization_errors` raises.
    """
    with sole_writer(output):
        network, batch = load_as_saved(model, dtype="float32"), load_batch(model, text)
        console = Console()
        with counting(console, "layers") as on_layer:
            errors = quantization_errors(network, config, rounds, double_quant, lambda: network(**batch), on_layer)
        settings = {"r": config.r, "num_cores": config.num_cores, "rounds": rounds, "double_quant": double_quant}
        layers = [dataclasses.asdict(layer) for layer in errors]
        write_json(output / "quantization.json", {"model": model, **settings, "layers": layers})
        title = f"{model_title(model)}: NF4, bond {config.r}, {config.num_cores} cores"
        table = error_table(errors, rounds, title)
        write_lines(output / "quantization.md", [markdown_tables([table])])
        plot(errors, rounds, title, output / "quantization.png")
        print_table(console, table)
        say(console, f"Table, plot and raw results: {output}")
        return errors


def error_table(errors: Sequence[LayerErrors], rounds: int, title: str) -> Table:
    """A row per layer and one of their means."""
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
        rows.append([short_name(layer.name) + mark, str(layer.svd_rank), *_means([layer], names)])
    rows.append(["mean", "", *_means(errors, names)])
    below = {name: sum(layer.weight[name] < layer.weight["QLoRA"] for layer in errors) for name in names[1:]}
    counts = ", ".join(f"{name} in {count}" for name, count in below.items())
    notes = [
        "Relative error × 100 of the 4-bit weight with the start of its adapter, and of the layer's output on text.",
        "SVD rank: of QPiSSA, whose two factors then have about as many elements as the MPO's cores. Rounds: 1 or "
        f"{rounds}.",
        f"Weight error below QLoRA's, of {len(errors)} layers: {counts}.",
        "·: an SVD of equal size keeps more than the MPO here. !: the MPO is no better than QLoRA here.",
    ]
    return Table(title, headers, rows, notes)


def _means(errors: Sequence[LayerErrors], names: Sequence[str]) -> list[str]:
    """The mean errors by method × 100, of the weights and, where they were measured, of the outputs."""
    return [
        f"{100 * statistics.fmean(getattr(layer, part)[name] for layer in errors):.2f}"
        if getattr(errors[0], part)
        else ""
        for part in ("weight", "output")
        for name in names
    ]


def plot(errors: Sequence[LayerErrors], rounds: int, title: str, path: Path) -> None:
    """Write a PNG: the error of every layer's weight, and of its output, by method."""
    panels = ["weight", "output"] if errors[0].output else ["weight"]
    figure, drawn = make_figure(max(8.0, 0.22 * len(errors) + 3), 3.6 * len(panels) + 1, len(panels))
    for axes, panel in zip(drawn, panels):
        for name, marker in zip(method_names(rounds), MARKERS):
            axes.plot([100 * getattr(layer, panel)[name] for layer in errors], marker, label=_label(name), markersize=5)
        axes.set(ylabel=f"relative error of the {panel} (%)", ylim=(0, None))
    name_layers(drawn, [short_name(layer.name) for layer in errors])
    legend_above(figure, title, columns=5)
    save_figure(figure, path)


def _label(name: str) -> str:
    method, _, count = name.partition(" ")
    return name if not count else f"{method}, {count} round{'' if count == '1' else 's'}"
