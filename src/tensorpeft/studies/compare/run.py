"""``tensorpeft compare``: from the recipe to the table and the report; called again, it goes on where it stood."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import datasets
from rich.console import Console

from tensorpeft.reports.files import to_json, write_json, write_lines
from tensorpeft.reports.terminal import make_progress, print_table, say
from tensorpeft.reports.versions import find_versions
from tensorpeft.studies.compare.cells import Runner
from tensorpeft.studies.compare.costs import CostMeter, saved_bytes
from tensorpeft.studies.compare.entries import Comparison, Entry
from tensorpeft.studies.compare.equal_size import fit_budget
from tensorpeft.studies.compare.html import write_html
from tensorpeft.studies.compare.plots import plot_curves, plot_front
from tensorpeft.studies.compare.results import EntryCosts, EntryResult, to_tree
from tensorpeft.studies.compare.table import main_table, markdown_report
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.run import check_recipe, quieten
from tensorpeft.training.seed import kept_folder
from tensorpeft.training.splits import load_splits


def run_compare(
    comparison: Comparison,
    timing_rounds: int = 7,  # of training steps; 0: nothing is timed
    command: str = "",  # for the report
    terminal: TextIO | None = None,  # for progress and table; None: standard output
) -> list[EntryResult]:
    """A result per entry, after printing the table and writing report.html, report.md, results.json and the plots.

    All entries see the same rows, steps and evaluation. Each chooses its learning rate on the validation loss of the
    first seed; only then are its final runs tested. Finished cells in the output folder are not run again; a cell that
    fails is shown as failed, the others go on.

    Raises:
        FileNotFoundError: a file of the recipe's data is missing.
        ValueError: the recipe is wrong, or the output folder holds cells of another recipe.
    """
    quieten()
    datasets.disable_progress_bars()
    console = Console(file=terminal)
    recipe = comparison.recipe
    splits = load_splits(recipe)
    for entry in comparison.entries:
        first = make_arguments(entry.recipe.trainer, splits.task, comparison.output, seed=0)
        options = check_recipe(entry.recipe, first)
    if first.world_size > 1:
        raise ValueError(f"{first.world_size} processes: the cells of a comparison run one by one. Start one process.")
    if comparison.budget is not None:
        comparison = fit_budget(comparison, splits.task, comparison.budget)
    for leak in splits.leaks:
        say(console, f"Leak: {leak}.")
    meter = CostMeter(comparison, splits, timing_rounds)
    with _Bar(console, comparison) as bar:
        runner = Runner(comparison, splits, options, bar.describe, bar.share, bar.done, bar.more)
        results = [_run_entry(entry, runner, meter, bar) for entry in comparison.entries]
    _write(comparison, results, command)
    print_table(console, main_table(comparison, results))
    say(console, f"Report, plots, raw results: {comparison.output}")
    return results


def _run_entry(entry: Entry, runner: Runner, meter: CostMeter, bar: "_Bar") -> EntryResult:
    search = runner.search(entry)
    final = runner.finish(entry, search)
    if not final:
        return EntryResult(entry, search, (), None, problem=next(run.problem for run in search if run.problem))
    bar.describe(f"{entry.label}, costs of a step")
    kept = [runner.folder(entry, run.rate, run.seed) / kept_folder(entry.recipe) for run in final]
    costs, problem = _measure(entry, runner.comparison, meter)
    failed = [run for run in final if run.result is None]
    if len(failed) == len(final):
        return EntryResult(entry, search, final, costs, problem=failed[0].problem)
    return EntryResult(entry, search, final, costs, saved_bytes(kept), problem)


def _measure(entry: Entry, comparison: Comparison, meter: CostMeter) -> tuple[EntryCosts | None, str]:
    """The costs, kept beside the entry's cells, and why there are none."""
    path = comparison.output / "entries" / entry.key / "costs.json"
    wanted = {"rounds": meter.rounds, "adapter": entry.recipe.adapter}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["of"] == json.loads(to_json(wanted)):
            return EntryCosts(**found["costs"]), ""
    try:
        costs = meter.measure(entry)
    except Exception as error:
        return None, f"costs: {type(error).__name__}: {error}"
    write_json(path, {"of": wanted, "costs": dataclasses.asdict(costs)})
    return costs, ""


def _write(comparison: Comparison, results: Sequence[EntryResult], command: str) -> None:
    output, versions = comparison.output, find_versions()
    write_json(output / "results.json", to_tree(comparison, results, versions))
    plots: list[tuple[str, Path]] = []
    for name, title, plot in (
        ("curves.png", "Validation loss along training", plot_curves),
        ("front.png", "What parameters buy", plot_front),
    ):
        if plot(comparison, results, output / name):
            plots.append((title, output / name))
    text = markdown_report(comparison, results, command, plots, versions)
    write_lines(output / "report.md", [text])
    write_html(comparison, results, command, plots, versions, output / "report.html")


class _Bar:
    """One bar over all cells; a context."""

    def __init__(self, console: Console, comparison: Comparison) -> None:
        self._done = 0.0
        self._total = sum(len(entry.rates) + comparison.seeds - 1 for entry in comparison.entries)
        self._progress = make_progress(console, width=42)
        self._task = self._progress.add_task("", total=self._total)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def share(self, share: float) -> None:
        self._progress.update(self._task, completed=self._done + share)

    def done(self) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done)

    def more(self, cells: int) -> None:
        self._total += cells
        self._progress.update(self._task, total=self._total)
