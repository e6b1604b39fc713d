"""``tensorpeft demo``: full fine-tuning, LoRA and DoTA on one task, from the choice of the rate to the report."""

import dataclasses
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers.utils import logging as transformers_logging

import tensorpeft
from tensorpeft.studies.costs import Costs, measure_costs
from tensorpeft.studies.demo_methods import Method
from tensorpeft.studies.finetune import Recipe, Row, build_model, draw_batches, encode, evaluate, finetune
from tensorpeft.studies.plot import plot_curves
from tensorpeft.studies.rates import rates_beyond
from tensorpeft.studies.report import TABLE_WIDTH, markdown_report, rich_table
from tensorpeft.studies.results import MethodResult, Run, Study
from tensorpeft.tasks.classification import ClassificationTask


@dataclass(frozen=True)
class Plan:
    """How much the demo does.

    Args:
        recipe: how every run trains.
        num_seeds: final runs per method, at least 1; the first seed also chooses the rate.
        validation_rows: rows of the validation loss, at most.
        test_rows: rows that are scored at the end, at most; the full plan takes all that either task has.
        timing_rounds: timed steps per method.
        rate_scale: what the methods' learning rates are multiplied with; a longer run wants smaller ones.
        max_widenings: how often a method whose best rate is the edge of its grid tries one more rate beyond.
        note: what a reader of the table must know about the plan.
    """

    recipe: Recipe
    num_seeds: int
    validation_rows: int
    test_rows: int
    timing_rounds: int
    rate_scale: float = 1.0
    max_widenings: int = 2
    note: str = ""

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(f"seeds={self.num_seeds}: expected at least 1 run to report. Pass a larger --seeds.")


def make_plan(
    quick: bool,
    steps: int | None = None,  # None: the plan's own
    num_seeds: int | None = None,  # None: the plan's own
    task: str = "docstrings",
) -> Plan:
    """The plan of ``tensorpeft demo``, or of ``tensorpeft demo --quick``.

    On CoLA every method starts with the most frequent class and leaves it late (`docs/demo.md`): its plan is longer,
    and its rates, the head's too, are smaller.

    Raises:
        ValueError: too few steps or seeds.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        return Plan(
            Recipe(steps=8 if steps is None else steps, num_evaluations=2, device=device),
            num_seeds=2 if num_seeds is None else num_seeds,
            validation_rows=80,
            test_rows=120,
            timing_rounds=3,
            max_widenings=0,
            note="--quick: it shows that everything runs. Too few steps, rows and seeds to compare methods.",
        )
    if task == "cola":
        return Plan(
            Recipe(
                steps=400 if steps is None else steps, num_evaluations=5, device=device, batch_size=32, head_rate=1e-3
            ),
            num_seeds=3 if num_seeds is None else num_seeds,
            validation_rows=600,
            test_rows=1200,
            timing_rounds=9,
            rate_scale=0.3,
        )
    return Plan(
        Recipe(steps=60 if steps is None else steps, num_evaluations=4, device=device),
        num_seeds=3 if num_seeds is None else num_seeds,
        validation_rows=200,
        test_rows=1200,
        timing_rounds=9,
    )


def run_demo(
    task: ClassificationTask,
    plan: Plan,
    methods: Sequence[Method],
    output: Path,  # folder, made where it does not exist
    command: str,  # for the report
    terminal: TextIO | None = None,  # for progress and table; None: standard output
) -> Study:
    """The finished study, after printing its table and writing report.md, curves.png and results.json."""
    _quieten()
    console = Console(file=terminal)
    task = dataclasses.replace(
        task, validation=task.validation.head(plan.validation_rows), test=task.test.head(plan.test_rows)
    )
    output.mkdir(parents=True, exist_ok=True)
    study = _run_study(task, plan, methods, command, console)
    plot_curves(study, output / "curves.png")
    (output / "report.md").write_text(markdown_report(study, figure="curves.png"), encoding="utf-8")
    (output / "results.json").write_text(json.dumps(study.to_json(), indent=1) + "\n", encoding="utf-8")
    # A pipe counts as 80 columns and a window may be smaller: better wrapped lines than numbers that are cut.
    wide = Console(file=terminal, width=max(console.width, TABLE_WIDTH))
    wide.print(rich_table(study))
    wide.print(f"Report, curves and raw results: {output}", soft_wrap=True)
    return study


def _quieten() -> None:
    """Keep what the libraries say on every one of many loads out of the progress bar."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Until PEFT reads is_activation_checkpointing instead of the attribute that transformers renames.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _run_study(
    task: ClassificationTask, plan: Plan, methods: Sequence[Method], command: str, console: Console
) -> Study:
    recipe = plan.recipe
    rows = {
        name: encode(split, recipe.max_tokens)
        for name, split in (("train", task.train), ("validation", task.validation), ("test", task.test))
    }
    timed_batch = _typical_batch(rows["train"], recipe)
    runner = _Runner(task, plan, rows)
    with _progress(console) as progress:
        bar = progress.add_task("costs of a step", total=sum(runner.num_steps(method) for method in methods))
        # First, because a method that cannot be built should say so before the others have run for minutes.
        costs = measure_costs(methods, len(task.label_names), timed_batch, recipe, plan.timing_rounds)
        results = [
            runner.run_method(
                method,
                method_costs,
                on_run=lambda text: progress.update(bar, description=text),
                on_step=lambda: progress.advance(bar),
                on_widening=lambda: progress.update(bar, total=(progress.tasks[bar].total or 0) + recipe.steps),
            )
            for method, method_costs in zip(methods, costs, strict=True)
        ]
    return Study(
        task=task,
        recipe=recipe,
        num_seeds=plan.num_seeds,
        timed_batch=(recipe.batch_size, _length(timed_batch)),
        results=tuple(results),
        versions=_versions(),
        threads=torch.get_num_threads(),
        command=command,
        note=plan.note,
    )


def _typical_batch(train: Sequence[Row], recipe: Recipe) -> list[Row]:
    """The batch whose padded length is nearest to the mean over the batches of a run."""
    batches = draw_batches(train, recipe.batch_size, recipe.steps, seed=0)
    mean = statistics.fmean(_length(batch) for batch in batches)
    return min(batches, key=lambda batch: abs(_length(batch) - mean))


def _length(batch: Sequence[Row]) -> int:
    return max(len(tokens) for tokens, _ in batch)


@dataclass(frozen=True)
class _Runner:
    """Runs one method after the other on the same rows."""

    task: ClassificationTask
    plan: Plan
    rows: dict[str, list[Row]]

    def num_steps(self, method: Method) -> int:
        return (len(method.rates) + self.plan.num_seeds - 1) * self.plan.recipe.steps

    def run_method(
        self,
        method: Method,
        costs: Costs,
        on_run: Callable[[str], object],  # called with a description before every run
        on_step: Callable[[], object],
        on_widening: Callable[[], object],  # called before a run that num_steps has not counted
    ) -> MethodResult:
        """Choose the rate with the first seed, then run the other seeds; score each final model once."""

        def train(rate: float, seed: int) -> tuple[nn.Module, Run]:
            on_run(f"{method.name}, rate {rate:g}, seed {seed}")
            model = build_model(method, len(self.task.label_names), seed)
            rows, recipe = self.rows, self.plan.recipe
            curve = finetune(
                model, rows["train"], rows["validation"], recipe, rate, seed, on_step, method.make_optimizer
            )
            return model, Run(rate, seed, tuple(curve))

        best_model, best = train(method.rates[0], 0)
        tried, todo = [best], list(method.rates[1:])
        while todo:
            model, run = train(todo.pop(0), 0)
            tried.append(run)
            if run.validation_loss < best.validation_loss:
                best_model, best = model, run
            if not todo and len(tried) < len(method.rates) + self.plan.max_widenings:
                todo = rates_beyond([run.rate for run in tried], best.rate)
                if todo:
                    on_widening()
        final = [self._score(best_model, best)]
        final += [self._score(*train(best.rate, seed)) for seed in range(1, self.plan.num_seeds)]
        return MethodResult(method, tuple(sorted(tried, key=lambda run: run.rate)), tuple(final), costs)

    def _score(self, model: nn.Module, run: Run) -> Run:
        _, predictions = evaluate(model, self.rows["test"], self.plan.recipe.device)
        labels = [label for _, label in self.rows["test"]]
        scores = {name: float(metric(labels, predictions)) for name, metric in self.task.metrics.items()}
        return dataclasses.replace(run, scores=scores)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<37}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "peft", "safetensors")
    ours = {"python": platform.python_version(), "tensorpeft": tensorpeft.__version__}
    return ours | {library: version(library) for library in libraries}
