"""Our points on the front of PEFT's MetaMathQA comparison: a table, and a figure.

    python benchmarks/peft_method_comparison/plot.py PEFT/method_comparison/MetaMathQA/results [--output front.png]

The folder holds result files that PEFT's script wrote (run.py); those of methods that are not ours, which
published.json has, and of other models, such as the small version's, are left out. The front: what no published
experiment with as many parameters or fewer beats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tensorpeft.reports.figures import make_figure, save_figure
from tensorpeft.reports.tables import markdown_table

FOLDER = Path(__file__).resolve().parent
PUBLISHED = FOLDER / "published.json"


class Point(NamedTuple):
    """What an experiment trained, and how well it answered GSM8K's test rows, from 0 to 1."""

    parameters: int
    accuracy: float


def read_published() -> dict[str, Point]:
    """PEFT's own results by experiment."""
    tree = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {name: Point(*point) for name, point in tree["experiments"].items()}


def read_results(
    folder: Path,  # of files as PEFT's script writes them
) -> dict[str, Point]:
    """The finished results of our experiments by name; of several files of one, that of the last name, the latest."""
    model = json.loads(PUBLISHED.read_text(encoding="utf-8"))["model"]
    ours, found = {file.name for file in (FOLDER / "experiments").iterdir()}, {}
    for file in sorted(folder.glob("*.json")):
        tree = json.loads(file.read_text(encoding="utf-8"))
        name, trained = tree["run_info"]["experiment_name"], tree["train_info"]
        accuracies = [entry["test accuracy"] for entry in trained["metrics"] if "test accuracy" in entry]
        is_ours = name.partition("/")[0] in ours and tree["run_info"]["train_config"]["model_id"] == model
        if is_ours and trained["status"] == "success" and accuracies:
            found[name] = Point(trained["num_trainable_params"], accuracies[-1])
    return found


def front_of(points: Iterable[Point]) -> list[Point]:
    """The points that are better than all with as many parameters or fewer, by size."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.parameters, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def best_below(front: Iterable[Point], parameters: int) -> Point | None:
    """The best of a front that has no more parameters; None: there is none so small."""
    return max((point for point in front if point.parameters <= parameters), key=lambda p: p.accuracy, default=None)


def make_table(ours: Mapping[str, Point], front: Iterable[Point]) -> str:
    """A row per experiment: its point, and the best published one of its size or smaller."""
    front, rows = list(front), []
    for name, point in sorted(ours.items(), key=lambda item: item[1]):
        best = best_below(front, point.parameters)
        beaten = "-" if best is None else f"{best.accuracy:.3f} ({best.parameters:,})"
        better = "" if best is None else f"{100 * (point.accuracy - best.accuracy):+.1f}"
        rows.append([name, f"{point.parameters:,}", f"{point.accuracy:.3f}", beaten, better])
    return markdown_table(["experiment", "parameters", "accuracy", "best published, no larger", "points above"], rows)


def draw(published: Mapping[str, Point], ours: Mapping[str, Point], path: Path) -> None:
    """Write the figure: published points in grey, their front as a line, ours with their names."""
    figure, (axes,) = make_figure(9, 5.5)
    axes.plot(*zip(*published.values()), "o", color="0.7", markersize=4, label="PEFT's methods")
    axes.plot(*zip(*front_of(published.values())), color="0.4", drawstyle="steps-post", label="their front")
    if ours:
        axes.plot(*zip(*ours.values()), "s", color="C3", markersize=5, label="tensorpeft")
    for name, point in ours.items():
        short = name.replace("llama-3.2-3B-", "")
        axes.annotate(short, point, xytext=(3, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="GSM8K test accuracy")
    axes.set_title("Llama-3.2-3B, 5,000 steps of 4 rows of MetaMathQA")
    axes.legend(loc="lower right")
    save_figure(figure, path)


def main() -> None:
    """Print the table, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of result files")
    parser.add_argument("--output", type=Path, default=Path("front.png"))
    arguments = parser.parse_args()
    published, ours = read_published(), read_results(arguments.results)
    if not ours:
        parser.error(
            f"{arguments.results} has no finished result of ours on the model of published.json. Run run.py first."
        )
    print(make_table(ours, front_of(published.values())))
    draw(published, ours, arguments.output)
    print(f"\nFigure: {arguments.output}")


if __name__ == "__main__":
    main()
