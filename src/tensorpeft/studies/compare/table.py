"""A comparison as tables, and as Markdown."""

import math
from collections.abc import Sequence
from pathlib import Path

from tensorpeft.reports.tables import (
    Table,
    markdown_document,
    markdown_list,
    markdown_table,
    markdown_tables,
    mean_and_sd,
    model_title,
)
from tensorpeft.reports.versions import find_versions, tell_differing
from tensorpeft.studies.catalogue import REFERENCE
from tensorpeft.studies.compare.answers import AnsweredQuestion, answer_table
from tensorpeft.studies.compare.entries import Comparison
from tensorpeft.studies.compare.results import EntryResult, Run, common_loss, find_metrics, mean_gain, steps_to

_FAILED = "failed"


def main_table(comparison: Comparison, results: Sequence[EntryResult]) -> Table:
    """A row per entry, under headers of up to two lines each."""
    metrics = find_metrics(results)
    timed = any(result.costs is not None and result.costs.step_seconds for result in results)
    target = target_loss(comparison, results)
    headers = ["method", *(f"{metric}\n({test})" for test, metric in metrics), "valid.\nloss", "trained,\nhead apart"]
    headers += ["\nrate", "saved\nMB"]
    if timed:
        headers += ["step, ms\n(× LoRA)", "peak\nMiB", f"s to loss\n{target:.3f}" if target else "s to loss"]
    rows = []
    for result in results:
        if not result.finished:
            rows.append([result.entry.label, _FAILED, *[""] * (len(headers) - 2)])
            continue
        row = [result.entry.label, *(mean_and_sd(result.scores(*metric)) for metric in metrics)]
        row += [mean_and_sd(result.losses()), "" if result.costs is None else f"{result.costs.parameters:,}"]
        if not result.entry.rates:
            rows.append(row + [""] * (len(headers) - len(row)))
            continue
        row += [f"{result.rate:g}{'*' if result.chose_the_edge else ''}", f"{result.saved_bytes / 1e6:.2f}"]
        rows.append(row + (_costs(result, target) if timed else []))
    return Table(title(comparison), headers, rows, legend(comparison, results))


def target_loss(comparison: Comparison, results: Sequence[EntryResult]) -> float | None:
    """The loss of "time to a loss": the one that was asked for, or the lowest that all entries reach."""
    return comparison.target_loss if comparison.target_loss is not None else common_loss(results)


def _costs(result: EntryResult, target: float | None) -> list[str]:
    costs = result.costs
    if costs is None:
        return [_FAILED, "", ""]
    ratio = f" ({costs.ratio:.2f})" if costs.ratio else ""
    steps = None if target is None else steps_to(result.mean_curve(), target)
    seconds = "never" if steps is None else f"{steps * costs.step_seconds:.1f}"
    return [f"{costs.step_seconds * 1000:.0f}{ratio}", f"{costs.peak_bytes / 2**20:.0f}", seconds]


def title(comparison: Comparison) -> str:
    """What was compared on what, in one line."""
    recipe = comparison.recipe
    seeds = f"{comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}"
    return f"{model_title(recipe.model)} on {recipe.task}, {seeds}"


def legend(comparison: Comparison, results: Sequence[EntryResult]) -> list[str]:
    """What a reader of the table must know, a sentence or two per line."""
    spread = "mean ± standard deviation over the seeds" if comparison.seeds > 1 else "one seed"
    head = next((result.costs.head_parameters for result in results if result.costs is not None), 0)
    loss = "in nats" if comparison.recipe.loss_unit == "nats" else comparison.recipe.loss_unit
    lines = [f"Scores: test rows, scored once per final run, {spread}. Valid. loss: {loss}, of the kept checkpoint."]
    searched = [result.entry.label for result in results if len(result.search) > 1]
    fixed = [result.entry.label for result in results if len(result.search) == 1]
    if searched:
        whose = f", of {', '.join(searched)}; one for the others" if fixed else ""
        lines.append(f"Rate: chosen on the first seed's validation loss from a grid of the method's{whose}.")
    else:
        lines.append("Rate: the learning rate, one per method: nothing was searched.")
    trained = [result.entry for result in results if result.entry.rates]
    bounded = [entry for entry in trained if entry.recipe.max_step_kl is not None]
    if bounded:
        bounds = ", ".join(sorted({str(entry.recipe.max_step_kl) for entry in bounded}))
        whose = "" if len(bounded) == len(searched) + len(fixed) else f" of {', '.join(e.label for e in bounded)}"
        lines.append(f"Steps{whose} are bounded (max_step_kl: {bounds}): a rate that is too high is scaled down.")
    if head:
        lines.append(f"Trained: every method also trains a new head of {head:,} parameters.")
    if comparison.budget is not None:
        lines.append(f"Equal size: ranks set to come closest to {comparison.budget:,} trained parameters.")
    timed = [result.costs for result in results if result.costs is not None and result.costs.step_seconds]
    if timed:
        of_lora = " of LoRA, times a method's ratio to it, measured in turns" if any(c.ratio for c in timed) else ""
        lines.append(f"Step: median time of forward, backward and update{of_lora}.")
        lines.append("Peak: memory of a step above weights and optimiser state. s to loss: of the mean curve.")
        if bounded:
            lines.append(
                "What the bound looks at is in none of these: two forward passes and a copy, on a step of ten."
            )
    if any(result.chose_the_edge for result in results):
        lines.append("*: the best rate is at the edge of its grid; a better one may lie outside.")
    for result in results:
        done, wanted = len(result.finished), len(result.final)
        if result.problem:
            lines.append(f"{result.entry.label}: {result.problem.splitlines()[0]}")
        elif done < wanted:
            problem = next(run.problem for run in result.final if run.result is None)
            lines.append(f"{result.entry.label}: {wanted - done} of {wanted} final runs failed: {problem}")
        if result.entry.note:
            lines.append(f"{result.entry.label}: {result.entry.note}")
    runs = [(result.entry.label, run.result) for result in results for run in result.search + result.final]
    found = [(label, result.versions) for label, result in runs if result is not None]
    lines += (
        tell_differing([*found, ("this report", find_versions())]) if any(versions for _, versions in found) else []
    )
    return lines + ([comparison.note] if comparison.note else [])


def detail_tables(results: Sequence[EntryResult], answers: Sequence[AnsweredQuestion]) -> list[Table]:
    """What a report has below the main table: answers, if there are any, the rates that were tried, the final runs."""
    windows = [_window_table(results)] if any(result.window for result in results) else []
    answered = [answer_table(answers)] if answers else []
    return [*answered, *_gain_tables(results), _search_table(results), *windows, _seed_table(results)]


def _gain_tables(results: Sequence[EntryResult]) -> list[Table]:
    """How much each lowered the loss, of what the reference did; none where the reference did not lower it."""
    untrained = next((result for result in results if result.finished and not result.entry.rates), None)
    reference = next((result for result in results if result.finished and result.entry.key == REFERENCE), None)
    if untrained is None or reference is None:
        return []
    of_reference, label = mean_gain(reference, untrained), reference.entry.label
    if not 0 < of_reference < math.inf:
        return []
    rows = []
    for result in results:
        if result.finished and result is not untrained:
            gain = mean_gain(result, untrained)
            figures = [f"{gain:.3f}", f"{gain / of_reference:.1%}", mean_and_sd(result.behind(reference))]
            rows.append([result.entry.label, *(figures if math.isfinite(gain) else ["diverged", "", ""])])
    notes = [
        "Gain: by how much the mean validation loss is below that before training.",
        f"Above {label}: the loss less {label}'s with the same seed, which orders the rows alike for all; of the seeds "
        "that both have finished.",
    ]
    return [Table(f"Beside {label}", ["method", "gain", f"of {label}'s", f"above {label}"], rows, notes)]


def _search_table(results: Sequence[EntryResult]) -> Table:
    rows = [
        [
            result.entry.label,
            f"{run.rate:g}",
            _loss(run),
            "chosen" if result.final and run.rate == result.rate else "",
        ]
        for result in results
        for run in result.search
    ]
    headers = ["method", "learning rate", "validation loss, first seed", ""]
    return Table("Choice of the learning rate", headers, rows)


def _window_table(results: Sequence[EntryResult]) -> Table:
    rows = []
    for result in results:
        if (window := result.window) is not None:
            low, high = f"{window.low:.1e}", f"{window.high:.1e}"
            is_open = window.low_is_open or window.high_is_open
            row = [f"≤ {low}" if window.low_is_open else low, f"≥ {high}" if window.high_is_open else high]
            rows.append([result.entry.label, *row, f"{'≥ ' if is_open else ''}{window.factor:.1f}"])
    notes = [
        "Rates whose loss is within 0.02 of the best one's; between those tried, straight lines over its logarithm.",
        "≤, ≥: the end is the edge of what was tried.",
    ]
    return Table("Window of learning rates", ["method", "from", "to", "factor"], rows, notes)


def _seed_table(results: Sequence[EntryResult]) -> Table:
    metrics = find_metrics(results)
    rows = [
        [result.entry.label, str(run.seed), _loss(run), *(_score(run, *metric) for metric in metrics)]
        for result in results
        for run in result.final
    ]
    headers = ["method", "seed", "validation loss", *(f"test {test}: {metric}" for test, metric in metrics)]
    return Table("Seeds", headers, rows)


def _loss(run: Run) -> str:
    if run.result is None:
        return f"{_FAILED}: {run.problem.splitlines()[0]}"
    return f"{run.loss:.4f}" if math.isfinite(run.loss) else "diverged"


def _score(run: Run, test: str, metric: str) -> str:
    return "" if run.result is None or test not in run.result.tests else f"{run.result.tests[test][metric]:.4f}"


def markdown_report(
    comparison: Comparison,
    results: Sequence[EntryResult],
    answers: Sequence[AnsweredQuestion],
    command: str,
    plots: Sequence[tuple[str, Path]],  # title and file, beside the report
    versions: dict[str, str],
) -> str:
    """The whole report."""
    (heading, headers, rows, notes), recipe = main_table(comparison, results), comparison.recipe
    sections = [
        markdown_table(headers, rows),
        markdown_list(notes),
        *(f"![{name}]({path.name})" for name, path in plots),
        markdown_tables(detail_tables(results, answers)),
    ]
    return markdown_document(heading, recipe.description, command, sections, recipe.to_yaml(), versions)
