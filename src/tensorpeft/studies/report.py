"""A study as a table for the terminal and as a Markdown report."""

import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table

from tensorpeft.studies.demo_methods import REFERENCE
from tensorpeft.studies.results import MethodResult, Run, Study

TABLE_WIDTH = 100


def rich_table(study: Study) -> Table:
    """The table of the methods; with two metrics it fits ``TABLE_WIDTH`` columns."""
    headers, rows = _cells(study)
    table = Table(
        title=_summary(study),
        caption="\n".join(_legend(study)),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_report(
    study: Study,
    figure: str,  # file name of the figure, beside the report
) -> str:
    """The whole report: command, settings, table, figure, every run of the rate's choice, versions."""
    headers, rows = _cells(study)
    sections = [
        f"# tensorpeft demo: {study.task.name}",
        f"{_summary(study)}\n\n    {study.command}",
        "## Result",
        markdown_table(headers, rows),
        "\n".join(f"- {line}" for line in _legend(study)),
        f"![Validation loss along training]({figure})",
        "## Choice of the learning rate",
        _search_text(study),
        _search_table(study),
        "## Seeds",
        _seed_table(study),
        "## Settings",
        "\n".join(f"- {line}" for line in _settings(study)),
        "## Versions",
        "\n".join(f"- {library} {version}" for library, version in study.versions.items()),
    ]
    return "\n\n".join(sections) + "\n"


def _cells(study: Study) -> tuple[list[str], list[list[str]]]:
    """Headers, of two lines each, and a row per method."""
    metrics = list(study.task.metrics)
    headers = ["method", *(f"{name}\n× 100" for name in metrics), "valid.\nloss", "trained,\nhead apart"]
    headers += ["\nrate", "step, ms\n(× LoRA)", "peak\nMiB", "saved\nMB"]
    reference = next((result for result in study.results if result.method.key == REFERENCE), None)
    return headers, [_row(result, metrics, reference) for result in study.results]


def _row(result: MethodResult, metrics: list[str], reference: MethodResult | None) -> list[str]:
    scores = [[(run.scores or {})[name] * 100 for run in result.final] for name in metrics]
    ratio = f" ({result.step_seconds / reference.step_seconds:.2f})" if reference else ""
    return [
        result.method.name,
        *(_mean_and_sd(values, digits=1) for values in scores),
        f"{statistics.fmean(run.validation_loss for run in result.final):.3f}",
        f"{result.costs.other_parameters:,}",
        f"{result.rate:g}{'*' if result.chose_the_edge else ''}",
        f"{result.step_seconds * 1000:.0f}{ratio}",
        f"{result.costs.peak_bytes / 2**20:.0f}",
        f"{result.costs.checkpoint_bytes / 1e6:.2f}",
    ]


def _mean_and_sd(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _summary(study: Study) -> str:
    return (
        f"MiniLM-L6 on {study.task.name}: {len(study.task.label_names)} classes, {study.recipe.steps} steps of "
        f"{study.recipe.batch_size} rows, {study.num_seeds} seed{'s' if study.num_seeds > 1 else ''}"
    )


def _legend(study: Study) -> list[str]:
    """What a reader of the table must know, a sentence per line."""
    rows, tokens = study.timed_batch
    spread = "mean ± standard deviation over the seeds" if study.num_seeds > 1 else "one seed"
    lines = [study.note] if study.note else []
    lines += [
        f"Scores: {len(study.task.test)} test rows, {spread}. Always the most frequent class: "
        f"accuracy {study.majority_share() * 100:.1f}.",
        "Valid. loss: validation loss in nats, mean over the seeds. Rate: the learning rate, chosen on it.",
        f"Trained: every method also trains a head of {study.results[0].costs.head_parameters:,} parameters, which is "
        "in the saved file.",
        f"Step: {rows} × {tokens} tokens, median of {len(study.results[0].costs.step_seconds)}, methods in turn.",
        "Peak: memory of a training step above weights and optimiser state. Saved: safetensors on disk.",
    ]
    # CoLA takes many more steps than a demo has; zeros without this line look like a defect.
    if stuck := [result.method.name for result in study.results if _never_beats_majority(result, study)]:
        lines.append(f"Never above the most frequent class: {', '.join(stuck)}. Train longer: --steps N.")
    if any(result.chose_the_edge for result in study.results):
        lines.append("*: the best rate is at the edge of its grid; a better one may lie outside.")
    return lines + [f"{result.method.name}: {result.method.note}" for result in study.results if result.method.note]


def _never_beats_majority(result: MethodResult, study: Study) -> bool:
    return all((run.scores or {})["accuracy"] <= study.majority_share() for run in result.final)


def _search_text(study: Study) -> str:
    edge = [result.method.name for result in study.results if result.chose_the_edge]
    found = f"At the edge of its grid: {', '.join(edge)}." if edge else "No method chose the edge of its grid."
    return (
        "Validation loss after the last step, seed 0, for every learning rate of the method's grid. The lowest is "
        f"chosen, and its run is the first of the final runs. {found}"
    )


def _search_table(study: Study) -> str:
    rows = [
        [result.method.name, f"{run.rate:g}", f"{run.validation_loss:.4f}", "chosen" if run.rate == result.rate else ""]
        for result in study.results
        for run in result.search
    ]
    return markdown_table(["method", "learning rate", "validation loss", ""], rows)


def _seed_table(study: Study) -> str:
    metrics = list(study.task.metrics)
    rows = [
        [result.method.name, str(run.seed), f"{run.validation_loss:.4f}", *_scores(run, metrics)]
        for result in study.results
        for run in result.final
    ]
    return markdown_table(["method", "seed", "validation loss", *(f"test {name}" for name in metrics)], rows)


def _scores(run: Run, metrics: list[str]) -> list[str]:
    return [f"{(run.scores or {})[name]:.4f}" for name in metrics]


def _settings(study: Study) -> list[str]:
    task, recipe = study.task, study.recipe
    return [
        f"Task: {task.description} Rows: {len(task.train)} train, {len(task.validation)} validation, "
        f"{len(task.test)} test. Classes: {', '.join(task.label_names)}.",
        "Training: AdamW, unless a method's note names another optimiser; no weight decay, no dropout; cosine "
        f"schedule, warm-up ratio {recipe.warmup_ratio:g}; "
        f"{recipe.steps} steps of {recipe.batch_size} rows of similar length, at most {recipe.max_tokens} tokens each. "
        f"The head trains at {recipe.head_rate:g} with every method; the rates in the tables are those of the rest.",
        f"Seeds 0 to {study.num_seeds - 1}, the same for all methods: they set the head's start, the adapter's start "
        "and the order of the rows.",
        "Adapters: query, key, value and the two MLP weights of every layer, unless a method's note says otherwise. "
        "Full fine-tuning trains all weights.",
        "The test split is scored once per final run, after the last step.",
        f"Device: {recipe.device}, {study.threads} CPU threads.",
    ]


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the parts of a header that a terminal puts on several lines stand on one."""
    headers = [" ".join(header.split()) for header in headers]
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
