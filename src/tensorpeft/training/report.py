"""The report of a training run: a summary for the terminal, Markdown, and the curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from tensorpeft.reports.figures import make_figure, plot_band, save_figure
from tensorpeft.reports.files import write_lines
from tensorpeft.reports.tables import Table, markdown_document, markdown_list, markdown_table, mean_and_sd, model_title
from tensorpeft.reports.versions import find_versions, tell_differing
from tensorpeft.training.recipe import Recipe
from tensorpeft.training.results import SeedResult, common_curves
from tensorpeft.training.splits import Splits, describe_source

# What TRL logs for diagnosis.
_UNREPORTED = ("entropy", "num_tokens", "logps", "logits", "preparation_time")
_UNREPORTED += ("completions/", "clip_ratio", "reward_std", "zero_std", "/std", "sampling/", "step_time")


def summary(recipe: Recipe, results: Sequence[SeedResult]) -> Table:
    """The mean ± standard deviation over the seeds of everything measured, a row each."""
    reported = _common([result.validation for result in results])
    reported = [key for key in reported if not any(part in key for part in _UNREPORTED)]
    found = [(f"validation {key}", [result.validation[key] for result in results]) for key in reported]
    before = [reward for result in results for step, reward in result.curve("eval_reward") if step == 0]
    if len(before) == len(results):
        found.insert(0, ("validation reward before training", before))
    found += [(f"test {name}: {key}", [result.tests[name][key] for result in results]) for name, key in _tests(results)]
    rows = [(name, mean_and_sd(values, digits=4)) for name, values in found]
    return Table(_title(recipe, results), ("metric", "value"), rows)


def write_report(
    recipe: Recipe,
    splits: Splits,
    results: Sequence[SeedResult],
    command: str,
    output: Path,  # folder
) -> None:
    """Write report.md and curves.png."""
    plot_training(recipe, results, output / "curves.png")
    title, headers, rows, _ = summary(recipe, results)
    sections = ["## Result", markdown_table(headers, rows)]
    if len(results) > 1:
        sections += ["### Seeds", _seed_table(results)]
    if recipe.max_step_kl is not None:
        sections.append(_bound(recipe.max_step_kl, results))
    found = [(f"seed {result.seed}", result.versions) for result in results]
    sections += tell_differing([*found, ("this report", find_versions())])
    sections += ["![Loss along training](curves.png)", "## Data", markdown_list(_data(recipe, splits))]
    text = markdown_document(title, recipe.description, command, sections, recipe.to_yaml(), find_versions())
    write_lines(output / "report.md", [text])


def plot_training(recipe: Recipe, results: Sequence[SeedResult], path: Path) -> None:
    """Write a PNG of the losses along training, and beside it of the validation metrics, if there are any."""
    logged = {key for entry in results[0].history for key in entry}
    metrics = sorted(key for key in logged if key.startswith("eval_") and _is_score(key))
    is_rewarded = recipe.rewards is not None  # the validation's loss is then a reward, and has its own panel
    panels = 2 if metrics or is_rewarded else 1
    figure, axes = make_figure(1 + 5.5 * panels, 4.5, panels, columns=panels)
    for key, label, style in (("loss", "training", ":"), ("eval_loss", "validation", "-"))[: 1 if is_rewarded else 2]:
        _draw(axes[0], results, key, label, style)
    axes[0].set(title="Loss", ylabel="GRPO's loss" if is_rewarded else f"loss ({recipe.loss_unit})")
    if is_rewarded:
        _draw(axes[1], results, "reward", "reward in training", ":")
    for key in metrics:
        _draw(axes[1], results, key, key.removeprefix("eval_"), "-")
        axes[1].set(title="Validation metrics", ylabel="score")
    for ax in axes:
        ax.set_xlabel("optimiser step")
        ax.legend()
    seeds = "" if len(results) == 1 else f" (mean and range of {len(results)} seeds)"
    figure.suptitle(_title(recipe, results) + seeds)
    save_figure(figure, path)


def _draw(axes: Axes, results: Sequence[SeedResult], key: str, label: str, style: str) -> None:
    steps, curves = common_curves(results, key)
    if steps:
        marker = "o" if len(steps) <= 12 else None
        plot_band(axes, steps, curves, linestyle=style, marker=marker, markersize=4, label=label)


def _is_score(key: str) -> bool:
    """Whether what the trainer logged under this key lies between -1 and 1 and says how good the model is."""
    others = ("loss", "runtime", "per_second", "rewards/chosen", "rewards/rejected", "rewards/margins", *_UNREPORTED)
    return not any(part in key for part in others)


def _title(recipe: Recipe, results: Sequence[SeedResult]) -> str:
    method = "all weights" if recipe.adapter is None else str(recipe.adapter["method"])
    trained = f"{results[0].trained_parameters:,} of {results[0].all_parameters:,} parameters"
    return f"{model_title(recipe.model)}, {method} ({trained}), {recipe.task}, {results[0].steps} steps"


def _tests(results: Sequence[SeedResult]) -> list[tuple[str, str]]:
    """(test, metric) of everything tested."""
    names = _common([result.tests for result in results])
    return [(name, key) for name in names for key in _common([result.tests[name] for result in results])]


def _common(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that all have: a seed that was resumed after its training may have measured something else, too."""
    return [key for key in mappings[0] if all(key in other for other in mappings)]


def _seed_table(results: Sequence[SeedResult]) -> str:
    tests = _tests(results)
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
    return markdown_table(headers, rows)


def _bound(max_kl: float, results: Sequence[SeedResult]) -> str:
    scales = sorted(scale for result in results for _, scale in result.curve("rate_scale"))
    found = f"{scales[0]:.2g} to {scales[-1]:.2g}, in the median {median(scales):.2g}" if scales else "never logged"
    return f"Steps are bounded (max_step_kl: {max_kl:g}): the factor on the schedule's learning rate was {found}."


def _data(recipe: Recipe, splits: Splits) -> list[str]:
    lines = [
        f"Task {splits.task.name}: {splits.task.description}",
        f"Training: {len(splits.train)} rows of {describe_source(recipe.data.train)}.",
        f"Validation: {len(splits.validation)} rows of {describe_source(recipe.data.validation)}.",
    ]
    if recipe.rewards is not None:
        parts = " + ".join(f"{weight:g} × {name}" for name, weight in recipe.rewards.items())
        lines.append(f"Reward: {parts}, of answers that are drawn. Its mean, negative, is the validation loss.")
    for name, (task, examples) in splits.test.items():
        lines.append(f"Test {name}: {len(examples)} rows. {task.description}")
    leaks = [f"Leak: {leak}." for leak in splits.leaks]
    return lines + (leaks or ["No text of validation or test is also a training row's (case and spaces apart)."])
