"""``tensorpeft train``: a recipe from its rows to its report; killed at any moment, it goes on where it stood."""

import contextlib
from pathlib import Path
from typing import Any, TextIO

import datasets
from rich.console import Console
from transformers import TrainingArguments

from tensorpeft.evaluation.evaluate import check_mode
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.loading.quiet import quiet
from tensorpeft.reports.folders import sole_writer
from tensorpeft.reports.terminal import print_table, say
from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.task import LabelTask, PreferenceTask, QuestionTask, StructureTask, Task
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.learning_rate import with_learning_rate
from tensorpeft.training.models import adapter_config
from tensorpeft.training.progress import ProgressTeller, steps_bar
from tensorpeft.training.recipe import Recipe, check_keys
from tensorpeft.training.report import summary, write_report
from tensorpeft.training.results import SeedResult
from tensorpeft.training.rewards import find_rewards
from tensorpeft.training.seed import check_output, run_seed
from tensorpeft.training.splits import load_splits

# TRL prepares so many rows long enough for its own bars to be of use.
_MANY_ROWS = 10_000


@quiet()
def run_training(
    recipe: Recipe,
    resume: bool = False,
    command: str = "",  # for the report
    terminal: TextIO | None = None,  # for progress and summary; None: standard output
) -> list[SeedResult]:
    """The results of every seed, after writing checkpoints, adapters, predictions and the report to the output folder.

    Args:
        recipe: what is done; a learning rate that it does not name is filled in (`with_learning_rate`).
        resume: go on with an interrupted run in the output folder: seeds that are finished are not run again, one that
            was interrupted goes on at its last whole checkpoint. Without such a run, start.
        command: what the report says made it.
        terminal: what is written to.

    Raises:
        BlockingIOError: another run writes to the output folder.
        FileExistsError: the output folder holds a run and ``resume`` is False.
        FileNotFoundError: a file is missing.
        ValueError: the recipe, a row or a value is wrong, or the folder's run has another recipe.
    """
    given, recipe = recipe, with_learning_rate(recipe)
    task, output = find_task(recipe.task), Path(recipe.output)
    arguments = {
        seed: make_arguments(recipe.trainer, task, output / f"seed-{seed}", seed, recipe.rewards)
        for seed in recipe.seeds
    }
    first = arguments[recipe.seeds[0]]
    options = check_recipe(recipe, first)
    is_main = first.process_index == 0
    console = Console(file=terminal, quiet=not is_main)
    if recipe != given:
        rate, bound = recipe.trainer["learning_rate"], recipe.max_step_kl
        say(console, f"No trainer.learning_rate is given: {rate:g}, and steps are bounded (max_step_kl: {bound:g}).")
    # The other processes of a launch write to the folder too; they are this one's.
    with sole_writer(output) if is_main else contextlib.nullcontext():
        if is_main:
            check_output(output, recipe, resume)
        splits = load_splits(recipe)
        for test, examples in splits.test.values():
            check_mode(test, examples, options)
        for leak in splits.leaks:
            say(console, f"Leak: {leak}.")
        if len(splits.train) < _MANY_ROWS:
            datasets.disable_progress_bars()
        results = []
        for seed in recipe.seeds:
            with steps_bar(console, f"seed {seed}") as bar:
                teller = ProgressTeller(bar)
                results.append(run_seed(recipe, splits, arguments[seed], options, resume, console, teller))
        if is_main:
            write_report(recipe, splits, results, command, output)
            print_table(console, summary(recipe, results))
            say(console, f"Report, curves, adapters: {output}")
        return results


def check_recipe(
    recipe: Recipe,
    arguments: TrainingArguments,  # of any of its seeds
) -> EvaluationOptions:
    """How the recipe is tested, after looking over all that can be known without a row or a model.

    Raises:
        ValueError: a field is unknown, has a wrong value, or is one that the task's trainer would not look at.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs and one process: a batch would silently be {arguments.n_gpu} times as large. "
            "Start with accelerate launch -m tensorpeft train ..., or show one with CUDA_VISIBLE_DEVICES=0."
        )
    task = find_task(recipe.task)
    _check_fields(recipe, task)
    adapter_config(recipe, task)
    find_rewards(recipe.rewards or {}, task)
    check_keys(recipe.evaluate, EvaluationOptions.__dataclass_fields__, "evaluate")
    return evaluation_options(recipe, arguments)


def evaluation_options(
    recipe: Recipe,
    arguments: TrainingArguments,  # of any of its seeds
) -> EvaluationOptions:
    """How the recipe is tested."""
    # Questions are tested as they are asked in training, rows to classify as they are cut, the DPO loss with its beta.
    trained: dict[str, Any] = {"chat": recipe.data.chat}
    task = find_task(recipe.task)
    if isinstance(task, LabelTask):
        trained |= {"max_length": recipe.data.max_length}
    if isinstance(task, PreferenceTask):
        trained |= {"beta": arguments.beta}  # pyright: ignore[reportAttributeAccessIssue]
    return EvaluationOptions(**{**trained, **recipe.evaluate})


def _check_fields(recipe: Recipe, task: Task) -> None:
    """Refuse what the task's trainer would not look at, and a test that would have no reference."""
    if isinstance(task, PreferenceTask) and recipe.adapter is None and recipe.data.test is not None:
        raise ValueError(
            "data.test: preferences are tested against the base, which is gone where all weights are trained."
        )
    if recipe.quantize is not None and recipe.adapter is None:
        raise ValueError(
            "quantize: weights in 4 bits are not trained, and there is no adapter. Name one, or remove quantize."
        )
    if recipe.data.start_rows is not None and recipe.adapter is None:
        raise ValueError("data.start_rows: frames are an adapter's, and all weights are trained. Remove it.")
    if recipe.max_step_kl is not None and (
        isinstance(task, StructureTask) or (isinstance(task, LabelTask) and not task.label_names)
    ):
        raise ValueError(f"max_step_kl: a model for the task {task.name} tells no probabilities. Remove it.")
    has_head = isinstance(task, LabelTask | StructureTask)
    if recipe.data.max_length is not None and not has_head:
        raise ValueError(f"data.max_length: the task {task.name} is cut by trainer.max_length. Write it there.")
    if recipe.head_learning_rate is not None and not has_head:
        raise ValueError(f"head_learning_rate: a model for the task {task.name} gets no new head. Remove it.")
    if recipe.head is not None and (recipe.adapter is None or not isinstance(task, LabelTask)):
        raise ValueError(
            "head: what is trained of a new head stands beside an adapter of a model that gives labels. Leave it out "
            f"where all weights are trained, and for {task.name} if it is no such task."
        )
    if recipe.data.chat and not isinstance(task, QuestionTask):
        raise ValueError(f"data.chat: only questions are asked in a chat, {task.name} has none. Remove it.")
    if recipe.data.loss_on == "text" and recipe.rewards is not None:
        raise ValueError(
            "data.loss_on: text: with rewards no text is shown to the model, and none is learned. Remove it."
        )
    if recipe.data.loss_on == "text" and not isinstance(task, QuestionTask):
        raise ValueError(f"data.loss_on: text: only questions have a prompt to learn, {task.name} has none. Remove it.")
