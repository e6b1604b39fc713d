"""``tensorpeft compare``: from the recipe to the table and the report; called again, it goes on where it stood."""

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import datasets
from rich.console import Console
from transformers import TrainingArguments

from tensorpeft.evaluation.evaluate import check_mode
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.loading.quiet import quiet
from tensorpeft.reports.files import write_json, write_lines
from tensorpeft.reports.folders import sole_writer
from tensorpeft.reports.terminal import print_table, say
from tensorpeft.reports.versions import find_versions
from tensorpeft.studies.catalogue import NOT_LINEAR, OF_HIGH_RANK
from tensorpeft.studies.compare.answers import AnsweredQuestion, answer_lines, read_answers
from tensorpeft.studies.compare.cells import load_rows, run_cell
from tensorpeft.studies.compare.costs import CostMeter, saved_bytes
from tensorpeft.studies.compare.engine import check_engine, one_gpu, open_engine
from tensorpeft.studies.compare.entries import Comparison, Entry, with_untrained
from tensorpeft.studies.compare.equal_size import fit_budget
from tensorpeft.studies.compare.html import write_html
from tensorpeft.studies.compare.plots import plot_curves, plot_front
from tensorpeft.studies.compare.progress import CellsBar
from tensorpeft.studies.compare.results import EntryResult, Run, find_metrics, to_tree
from tensorpeft.studies.compare.runner import Runner
from tensorpeft.studies.compare.table import main_table, markdown_report
from tensorpeft.tasks.task import QuestionTask
from tensorpeft.training.adapters import is_ours
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.models import load_tokenizer
from tensorpeft.training.recipe import Recipe
from tensorpeft.training.run import check_recipe, evaluation_options
from tensorpeft.training.seed import kept_folder
from tensorpeft.training.splits import Splits

_ANSWERS, _PRINTED_ANSWERS = 12, 4  # questions of a test whose answers the report has, and the terminal
_NARROWEST = 100  # columns; a pipe counts as 80


@quiet()
def run_compare(
    comparison: Comparison,
    timing_rounds: int = 7,  # of training steps; 0: nothing is timed
    command: str = "",  # for the report
    terminal: TextIO | None = None,  # for progress and table; None: standard output
    workers: int | None = None,  # processes that cells run in, side by side; None: this one
    ray: str | None = None,  # address of a Ray cluster that they run on; "": the one here, or a new one; None: no Ray
) -> list[EntryResult]:
    """A result per entry, after printing the table and writing report.html, report.md, results.json and the plots.

    All entries see the same rows, steps and evaluation. One with several learning rates chooses on the validation loss
    of the first seed; only then are its final runs tested. Finished cells in the output folder are not run again; a
    cell that fails keeps its traceback in its folder and is shown as failed, the others go on. Steps are timed in this
    process when all cells are done.

    Raises:
        BlockingIOError: another comparison writes to the output folder.
        ConnectionError: there is no Ray cluster at the address.
        FileNotFoundError: a file of the recipe's data is missing.
        ModuleNotFoundError: Ray is asked for and not installed.
        ValueError: the recipe is wrong, its model is nowhere, the output folder holds cells of another recipe, there
            would be no worker, or both workers and Ray are asked for.
    """
    check_engine(workers, ray)
    datasets.disable_progress_bars()
    console = Console(file=terminal)
    with sole_writer(comparison.output), contextlib.ExitStack() as until_written:
        splits = load_rows(comparison.recipe, anew=True)
        with open_engine(run_cell, comparison.output / "workers", workers, ray) as engine:
            if workers is not None or ray is not None:  # they have been shared out
                until_written.enter_context(one_gpu())
            options = _check_entries(comparison, splits)
            if comparison.budget is not None:
                comparison = fit_budget(comparison, splits.task, comparison.budget)
            if isinstance(splits.task, QuestionTask) and splits.test:  # other tasks need a head that is trained first
                comparison = with_untrained(comparison)
            for leak in splits.leaks:
                say(console, f"Leak: {leak}.")
            num_cells = sum(_count_cells(entry, comparison.seeds) for entry in comparison.entries)
            bar = until_written.enter_context(CellsBar(console, num_cells))
            runner = Runner(comparison, bool(splits.test), options, engine, bar, splits.digests)
            runner.check_folders()
            runs = engine.each(runner.run, comparison.entries)
        meter = CostMeter(comparison, splits, timing_rounds)
        results = []
        for entry, (search, final) in zip(comparison.entries, runs):
            bar.describe(f"{entry.label}, costs of a step")
            results.append(_make_result(entry, search, final, runner, meter))
        until_written.close()
        answers = _read_answers(results, runner)
        _write(comparison, results, answers, command)
        _tell(console, comparison, results, answers)
        for line in _next_commands(results, runner) if isinstance(splits.task, QuestionTask) else ():
            say(console, line)
        return results


def _count_cells(entry: Entry, seeds: int) -> int:
    """How many are run of an entry whose best rate is no edge."""
    return len(entry.rates) + seeds - 1 if entry.rates else 1


def _read_answers(results: Sequence[EntryResult], runner: Runner) -> list[AnsweredQuestion]:
    """Answers to the first questions of the first test, by the first finished run of every entry."""
    firsts = [(result.entry, result.finished_runs[0]) for result in results if result.finished_runs]
    predictions = [
        (entry.label, runner.folder(entry, run.rate, run.seed) / f"predictions-{test}.jsonl")
        for test, _ in find_metrics(results)[:1]
        for entry, run in firsts
    ]
    return read_answers(predictions, _ANSWERS)


def _tell(
    console: Console, comparison: Comparison, results: Sequence[EntryResult], answers: Sequence[AnsweredQuestion]
) -> None:
    """Print some answers, the table, and where all is."""
    for line in answer_lines(answers[:_PRINTED_ANSWERS], max(console.width, _NARROWEST)):
        say(console, line)
    say(console, "")
    print_table(console, main_table(comparison, results))
    say(console, f"Report, plots, raw results: {comparison.output}")


def _next_commands(results: Sequence[EntryResult], runner: Runner) -> list[str]:
    """What to do with the adapter of the lowest validation loss."""
    adapted = [result for result in results if result.finished_runs and result.entry.recipe.adapter is not None]
    if not adapted:
        return []
    best, run = min(
        ((result, run) for result in adapted for run in result.finished_runs), key=lambda found: found[1].loss
    )
    folder = runner.folder(best.entry, run.rate, run.seed)
    adapter = shlex.quote(str(folder / kept_folder(best.entry.recipe)))
    commands = {f"chat {adapter}": "talk to it and to its base, side by side"}
    recipe = best.entry.recipe
    assert recipe.adapter is not None
    method = str(recipe.adapter["method"]).lower()
    if is_ours(recipe.adapter) and method not in (*OF_HIGH_RANK, *NOT_LINEAR) and recipe.quantize is None:
        commands[f"export lora {adapter} OUT-lora"] = "as a plain LoRA, for vLLM and PEFT"
        commands[f"export gguf {adapter} OUT.gguf"] = "as a GGUF LoRA, for llama.cpp"
    if method not in NOT_LINEAR:
        commands[f"export dense {adapter} OUT-merged"] = "merged into its base"
    # A purpose has its own line, as a shell's comment: a path alone may be as wide as a terminal.
    lines = [line for command, purpose in commands.items() for line in (f"  # {purpose}", f"  tensorpeft {command}")]
    return ["", f"Next, with {best.entry.label}:", *lines]


def _check_entries(comparison: Comparison, splits: Splits) -> EvaluationOptions:
    """How all entries are tested, which is the recipe's way, after looking over all that a cell would refuse."""

    def arguments_of(recipe: Recipe) -> TrainingArguments:
        return make_arguments(recipe.trainer, splits.task, comparison.output, 0, recipe.rewards)

    common = arguments_of(comparison.recipe)
    if common.world_size > 1:
        raise ValueError(
            f"{common.world_size} processes: a comparison starts its own. Start one process, with --workers N or --ray."
        )
    recipes = [entry.recipe for entry in comparison.entries]
    for recipe in recipes:
        check_recipe(recipe, arguments_of(recipe))
    for recipe in {recipe.model: recipe for recipe in recipes}.values():
        load_tokenizer(recipe, splits.task)  # as every cell does first: a model that is nowhere fails all at once
    options = evaluation_options(comparison.recipe, common)
    for task, examples in splits.test.values():
        check_mode(task, examples, options)
    return options


def _make_result(
    entry: Entry, search: tuple[Run, ...], final: tuple[Run, ...], runner: Runner, meter: CostMeter
) -> EntryResult:
    if not entry.rates:
        return EntryResult(entry, search, final, None, problem=final[0].problem)
    if not final:
        return EntryResult(entry, search, (), None, problem=next(run.problem for run in search if run.problem))
    kept = [runner.folder(entry, run.rate, run.seed) / kept_folder(entry.recipe) for run in final]
    costs, problem = None, ""
    try:
        costs = meter.costs(entry)
    except Exception as error:
        problem = f"costs: {type(error).__name__}: {error}"
    if all(run.result is None for run in final):
        problem = final[0].problem
    return EntryResult(entry, search, final, costs, saved_bytes(kept), problem)


def _write(
    comparison: Comparison, results: Sequence[EntryResult], answers: Sequence[AnsweredQuestion], command: str
) -> None:
    output, versions = comparison.output, find_versions()
    write_json(output / "results.json", to_tree(comparison, results, versions))
    plots: list[tuple[str, Path]] = []
    for name, title, plot in (
        ("curves.png", "Validation loss along training", plot_curves),
        ("front.png", "What parameters buy", plot_front),
    ):
        if plot(comparison, results, output / name):
            plots.append((title, output / name))
    text = markdown_report(comparison, results, answers, command, plots, versions)
    write_lines(output / "report.md", [text])
    write_html(comparison, results, answers, command, plots, versions, output / "report.html")
