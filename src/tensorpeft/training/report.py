"""The report of a training run: a summary for the terminal, Markdown, and the curves."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from tensorpeft.evaluation.report import find_versions
from tensorpeft.training.recipe import Recipe
from tensorpeft.training.results import SeedResult
from tensorpeft.training.splits import Splits, describe_source

# What TRL logs for diagnosis.
_UNREPORTED = ("entropy", "num_tokens", "logps", "logits")


def print_summary(recipe: Recipe, results: Sequence[SeedResult], console: Console) -> None:
    """Print the metrics, a line each."""
    console.print(_title(recipe, results), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("metric", "value"):
        table.add_column(header, justify="left" if header == "metric" else "right")
    for name, value in _metrics(results):
        table.add_row(name, value)
    console.print(table)


def write_report(
    recipe: Recipe,
    splits: Splits,
    results: Sequence[SeedResult],
    command: str,
    output: Path,  # folder
) -> None:
    """Write report.md and curves.png."""
    plot_training(recipe, results, output / "curves.png")
    sections = [f"# {_title(recipe, results)}", recipe.description.strip(), f"    {command}" if command else ""]
    sections += ["## Result", _table(["metric", "value"], [list(row) for row in _metrics(results)])]
    if len(results) > 1:
        sections += ["### Seeds", _seed_table(results)]
    sections += [
        "![Loss along training](curves.png)",
        "## Data",
        "\n".join(f"- {line}" for line in _data(recipe, splits)),
    ]
    sections += ["## Recipe", f"```yaml\n{recipe.to_yaml().rstrip()}\n```"]
    sections += ["## Versions", "\n".join(f"- {name} {version}" for name, version in find_versions().items())]
    text = "\n\n".join(section for section in sections if section) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")


def plot_training(recipe: Recipe, results: Sequence[SeedResult], path: Path) -> None:
    """Write a PNG of the losses along training, and beside it of the validation metrics, if there are any."""
    metrics = [key for key in results[0].curves("eval_") if _is_score(key)]
    figure = Figure(figsize=(12 if metrics else 7, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2 if metrics else 1, squeeze=False)[0]
    for key, label, style in (("loss", "training", ":"), ("eval_loss", "validation", "-")):
        _draw(axes[0], results, key, label, style)
    axes[0].set_ylabel("loss (nats)")
    axes[0].set_title("Loss")
    if metrics:
        for key in metrics:
            _draw(axes[1], results, key, key.removeprefix("eval_"), "-")
        axes[1].set_ylabel("score")
        axes[1].set_title("Validation metrics")
    for ax in axes:
        ax.set_xlabel("optimiser step")
        ax.grid(alpha=0.3)
        ax.legend()
    seeds = "" if len(results) == 1 else f" (mean and range of {len(results)} seeds)"
    figure.suptitle(_title(recipe, results) + seeds)
    figure.savefig(path)


def _draw(axes, results: Sequence[SeedResult], key: str, label: str, style: str) -> None:  # axes: of matplotlib
    curves = [dict(result.curve(key)) for result in results]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        return
    values = [[curve[step] for curve in curves] for step in steps]
    marker = "o" if len(steps) <= 12 else None
    (line,) = axes.plot(steps, [statistics.fmean(v) for v in values], style, marker=marker, markersize=4, label=label)
    axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15)


def _is_score(key: str) -> bool:
    """Whether what the trainer logged under this key lies between -1 and 1 and says how good the model is."""
    others = ("loss", "runtime", "per_second", "rewards/chosen", "rewards/rejected", "rewards/margins", *_UNREPORTED)
    return not any(part in key for part in others)


def _title(recipe: Recipe, results: Sequence[SeedResult]) -> str:
    method = "all weights" if recipe.adapter is None else str(recipe.adapter["method"])
    trained = f"{results[0].trained_parameters:,} of {results[0].all_parameters:,} parameters"
    model = "/".join(Path(recipe.model).parts[-2:])
    return f"{model}, {method} ({trained}), {recipe.task}, {results[0].steps} steps"


def _metrics(results: Sequence[SeedResult]) -> list[tuple[str, str]]:
    """(name, mean ± standard deviation over the seeds) of everything measured."""
    reported = [key for key in results[0].validation if not any(part in key for part in _UNREPORTED)]
    rows = [(f"validation {key}", [result.validation[key] for result in results]) for key in reported]
    rows += [
        (f"test {name}: {key}", [result.tests[name][key] for result in results])
        for name, metrics in results[0].tests.items()
        for key in metrics
    ]
    return [(name, _mean_and_sd(values)) for name, values in rows]


def _mean_and_sd(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _seed_table(results: Sequence[SeedResult]) -> str:
    tests = [(name, key) for name, metrics in results[0].tests.items() for key in metrics]
    headers = ["seed", "kept step", "validation loss", *(f"{name}: {key}" for name, key in tests)]
    rows = [
        [
            str(result.seed),
            "last" if result.best_step is None else str(result.best_step),
            f"{result.validation['loss']:.4f}",
            *(f"{result.tests[name][key]:.4f}" for name, key in tests),
        ]
        for result in results
    ]
    return _table(headers, rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [headers, ["---"] * len(headers), *rows])


def _data(recipe: Recipe, splits: Splits) -> list[str]:
    lines = [
        f"Task {splits.task.name}: {splits.task.description}",
        f"Training: {len(splits.train)} rows of {describe_source(recipe.data.train)}.",
        f"Validation: {len(splits.validation)} rows of {describe_source(recipe.data.validation)}.",
    ]
    for name, (task, examples) in splits.test.items():
        lines.append(f"Test {name}: {len(examples)} rows. {task.description}")
    leaks = [f"Leak: {leak}." for leak in splits.leaks]
    return lines + (leaks or ["No text of validation or test is also a training row's (case and spaces apart)."])
