"""``tensorpeft train``: a recipe from its rows to its report; killed at any moment, it goes on where it stood."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import datasets
from omegaconf import OmegaConf
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from tensorpeft.evaluation.evaluate import check_mode, evaluate_task
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.report import to_json, write_lines
from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.task import LabelTask, PreferenceTask, QuestionTask, StructureTask, Task
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.checkpoints import last_whole_checkpoint, train_from
from tensorpeft.training.models import adapter_config, load_tokenizer
from tensorpeft.training.progress import ProgressBar
from tensorpeft.training.recipe import Recipe, check_keys
from tensorpeft.training.report import print_summary, write_report
from tensorpeft.training.results import SeedResult, read_result
from tensorpeft.training.sharding import prepare_sharding, whole_model
from tensorpeft.training.splits import Splits, load_splits
from tensorpeft.training.trainers import make_trainer

# TRL prepares so many rows long enough for its own bars to be of use.
_MANY_ROWS = 10_000
_RECIPE, _RESULTS = "recipe.yaml", "results.json"


def run_training(
    recipe: Recipe,
    resume: bool = False,
    command: str = "",  # for the report
    terminal: TextIO | None = None,  # for progress and summary; None: standard output
) -> list[SeedResult]:
    """The results of every seed, after writing checkpoints, adapters, predictions and the report to the output folder.

    Args:
        recipe: what is done.
        resume: go on with an interrupted run in the output folder: seeds that are finished are not run again, one that
            was interrupted goes on at its last whole checkpoint. Without such a run, start.
        command: what the report says made it.
        terminal: what is written to.

    Raises:
        FileExistsError: the output folder holds a run and ``resume`` is False.
        FileNotFoundError: a file is missing.
        ValueError: the recipe, a row or a value is wrong, or the folder's run has another recipe.
    """
    _quieten()
    task, output = find_task(recipe.task), Path(recipe.output)
    arguments = {seed: make_arguments(recipe.trainer, task, output / f"seed-{seed}", seed) for seed in recipe.seeds}
    first = arguments[recipe.seeds[0]]
    options = _options(recipe, first)
    if first.n_gpu > 1:
        raise ValueError(
            f"{first.n_gpu} GPUs and one process: a batch would silently be {first.n_gpu} times as large. Start with "
            "accelerate launch -m tensorpeft train ..., or show one with CUDA_VISIBLE_DEVICES=0."
        )
    _check_fields(recipe, task)
    adapter_config(recipe, task)
    is_main = first.process_index == 0
    console = Console(file=terminal, quiet=not is_main)
    if is_main:
        _check_output(output, recipe, resume)
    splits = load_splits(recipe)
    for test, examples in splits.test.values():
        check_mode(test, examples, options)
    for leak in splits.leaks:
        console.print(f"Leak: {leak}.", soft_wrap=True)
    if len(splits.train) < _MANY_ROWS:
        datasets.disable_progress_bars()
    results = [_run_seed(recipe, splits, arguments[seed], options, resume, console) for seed in recipe.seeds]
    if is_main:
        write_report(recipe, splits, results, command, output)
        print_summary(recipe, results, console)
        console.print(f"Report, curves, adapters: {output}", soft_wrap=True)
    return results


def _quieten() -> None:
    """Keep what the libraries say on every load out of the progress bar."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Until PEFT reads is_activation_checkpointing instead of the attribute that transformers renames.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _options(recipe: Recipe, arguments: TrainingArguments) -> EvaluationOptions:
    """Those of the recipe; the DPO loss is tested with the beta that it is trained with."""
    check_keys(recipe.evaluate, EvaluationOptions.__dataclass_fields__, "evaluate")
    trained = {"beta": arguments.beta} if hasattr(arguments, "beta") else {}  # pyright: ignore[reportAttributeAccessIssue]
    return EvaluationOptions(**{**trained, **recipe.evaluate})


def _check_fields(recipe: Recipe, task: Task) -> None:
    """Refuse what the task's trainer would not look at, and a test that would have no reference."""
    if isinstance(task, PreferenceTask) and recipe.adapter is None and recipe.data.test is not None:
        raise ValueError(
            "data.test: preferences are tested against the base, which is gone where all weights are trained."
        )
    has_head = isinstance(task, LabelTask | StructureTask)
    if recipe.data.max_length is not None and not has_head:
        raise ValueError(f"data.max_length: the task {task.name} is cut by trainer.max_length. Write it there.")
    if recipe.head_learning_rate is not None and not has_head:
        raise ValueError(f"head_learning_rate: a model for the task {task.name} gets no new head. Remove it.")
    if recipe.data.loss_on == "text" and not isinstance(task, QuestionTask):
        raise ValueError(f"data.loss_on: text: only questions have a prompt to learn, {task.name} has none. Remove it.")


def _claim(output: Path, recipe: Recipe) -> None:
    """Make the folder that of this recipe: from here on it holds a run."""
    write_lines(output / _RECIPE, [recipe.to_yaml().rstrip()])


def _check_output(output: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse to write over another run, or to go on with another recipe."""
    if not (output / _RECIPE).is_file():
        return
    if not resume:
        raise FileExistsError(
            f"{output} holds a run already. Pass --resume to go on with it, output=FOLDER for another folder, or "
            "remove it."
        )
    found: Any = OmegaConf.to_container(OmegaConf.load(output / _RECIPE))
    wanted: Any = OmegaConf.to_container(OmegaConf.create(recipe.to_yaml()))
    # More seeds may be added, and a folder may be moved.
    if other := [key for key in wanted if key not in ("seeds", "output") and found.get(key) != wanted[key]]:
        raise ValueError(
            f"{output / _RECIPE}: the run has {other[0]}: {found.get(other[0])}, the recipe {wanted[other[0]]}. Resume "
            "with the recipe of the run, or pass another output=FOLDER."
        )


def _run_seed(
    recipe: Recipe,
    splits: Splits,
    arguments: TrainingArguments,
    options: EvaluationOptions,
    resume: bool,
    console: Console,
) -> SeedResult:
    folder = Path(str(arguments.output_dir))
    if resume and (folder / _RESULTS).is_file():
        return read_result(folder / _RESULTS)
    tokenizer = None if isinstance(splits.task, StructureTask) else load_tokenizer(recipe)
    trainer = make_trainer(recipe, splits, tokenizer, arguments)
    prepare_sharding(trainer, recipe, splits.task)
    if trainer.is_world_process_zero():
        _claim(folder.parent, recipe)  # not before: a model or an adapter that cannot be made leaves no run behind
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    bar = ProgressBar(console, f"seed {arguments.seed}")
    trainer.add_callback(bar)
    try:
        with arguments.main_process_first(local=False):  # it removes what is half-written, the others find it gone
            checkpoint = last_whole_checkpoint(folder) if resume else None
        train_from(trainer, checkpoint)
    finally:
        bar.stop()
    history = tuple(trainer.state.log_history)  # before the kept checkpoint is evaluated, under the last step's number
    validation = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    saved = folder / ("model" if recipe.adapter is None else "adapter")
    _save(trainer, saved)
    parameters = list(trainer.model.parameters())  # pyright: ignore[reportOptionalMemberAccess]
    result = SeedResult(
        seed=arguments.seed,
        history=history,
        validation=_only_numbers(validation),
        best_step=trainer.state.best_global_step if arguments.load_best_model_at_end else None,
        steps=trainer.state.max_steps,
        tests=_test(trainer, recipe, tokenizer, splits, options, saved, console),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        all_parameters=sum(p.numel() for p in parameters),
    )
    if trainer.is_world_process_zero():
        result.write(folder / _RESULTS)
    return result


def _save(trainer: Trainer, folder: Path) -> None:
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        # A pickle: nobody who is given the adapter should have to trust it.
        (folder / "training_args.bin").unlink(missing_ok=True)


def _only_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    timings = ("runtime", "samples_per_second", "steps_per_second", "epoch")
    return {key: float(value) for key, value in metrics.items() if key not in timings and value is not None}


def _test(
    trainer: Trainer,
    recipe: Recipe,
    tokenizer: Any,
    splits: Splits,
    options: EvaluationOptions,
    saved: Path,  # the trained adapter, or model
    console: Console,
) -> dict[str, dict[str, float]]:
    """The metrics of every test by name, on the main process; its predictions are written beside the adapter."""
    if not trainer.is_world_process_zero() or not splits.test:
        return {}
    metrics, model = {}, whole_model(trainer, recipe, splits.task, tokenizer, saved)
    for name, (task, examples) in splits.test.items():
        with console.status(f"test: {name}, {len(examples)} rows"):
            found = evaluate_task(model, tokenizer, task, examples, options)
        write_lines(saved.with_name(f"predictions-{name}.jsonl"), (to_json(row) for row in found.rows))
        metrics[name] = dict(found.metrics)
    return metrics
