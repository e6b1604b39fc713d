"""The run of one seed of a recipe: trained, kept, tested; killed at any moment, it goes on where it stood."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import OmegaConf
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from tensorpeft import BoundedSteps
from tensorpeft.evaluation.evaluate import evaluate_task
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.reports.files import write_json_lines, write_lines
from tensorpeft.reports.terminal import plain
from tensorpeft.training.checkpoints import kept_step, last_whole_checkpoint, train_from
from tensorpeft.training.head import fold_head
from tensorpeft.training.models import load_tokenizer
from tensorpeft.training.recipe import RECIPE_FILE, Recipe
from tensorpeft.training.results import SeedResult, read_result
from tensorpeft.training.sharding import prepare_sharding, whole_model
from tensorpeft.training.splits import Splits, shortest
from tensorpeft.training.start import start_from_gradients
from tensorpeft.training.trainers import make_trainer, tell_dropped_rows

RESULTS = "results.json"
WHOLE_MODEL = "model"


def _claim(output: Path, recipe: Recipe) -> None:
    """Make the folder that of this recipe: from here on it holds a run."""
    file, text = output / RECIPE_FILE, f"{recipe.to_yaml().rstrip()}\n"
    output.mkdir(parents=True, exist_ok=True)
    # Other seeds may run at the same time, and do the same.
    with FileLock(output / f".{RECIPE_FILE}.lock"):
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_lines(file, text.splitlines())


def check_output(
    output: Path,
    recipe: Recipe,
    resume: bool,
    is_tested_later: bool = False,  # a run without tests may be given some, by `score_seed`
) -> None:
    """Refuse to write over another run, or to go on with another recipe."""
    if not (output / RECIPE_FILE).is_file():
        return
    if not resume:
        raise FileExistsError(
            f"{output} holds a run already. Pass --resume to go on with it, output=FOLDER for another folder, or "
            "remove it."
        )
    found: Any = OmegaConf.to_container(OmegaConf.load(output / RECIPE_FILE))
    wanted: Any = OmegaConf.to_container(OmegaConf.create(recipe.to_yaml()))
    if is_tested_later and found["data"].get("test") is None:
        found["data"] |= {name: wanted["data"][name] for name in ("test", "test_rows")}
        found["evaluate"] = wanted["evaluate"]
    # More seeds may be added, a folder may be moved, a description says nothing that is run.
    free = ("seeds", "output", "description")
    if other := [key for key in wanted if key not in free and found.get(key) != wanted[key]]:
        raise ValueError(
            f"{output / RECIPE_FILE}: the run has {other[0]}: {found.get(other[0])}, the recipe {wanted[other[0]]}. "
            "Resume with the recipe of the run, or pass another folder (output=FOLDER, compare: --output FOLDER)."
        )


def run_seed(
    recipe: Recipe,
    splits: Splits,
    arguments: TrainingArguments,  # of this seed: its folder, too
    options: EvaluationOptions,
    resume: bool,
    console: Console,
    bar: TrainerCallback,
) -> SeedResult:
    """The result of one seed, after writing adapter (or model), predictions and result to the arguments' folder.

    Args:
        recipe: what is done; its own folder and seeds are not looked at.
        splits: its rows; where no test is among them, `score_seed` makes up for it.
        arguments: of this seed, and with the folder that it writes to.
        options: of the tests.
        resume: a finished run is not run again, one that was interrupted goes on at its last whole checkpoint.
        console: of the tests' status.
        bar: told of every step.
    """
    folder = Path(str(arguments.output_dir))
    if resume and (folder / RESULTS).is_file():
        return read_result(folder / RESULTS)
    tokenizer = load_tokenizer(recipe, splits.task)
    trainer = make_trainer(recipe, splits, tokenizer, arguments)
    prepare_sharding(trainer, recipe, splits.task)
    if trainer.is_world_process_zero():
        _claim(folder.parent, recipe)  # not before: a model or an adapter that cannot be made leaves no run behind
    tell_dropped_rows(trainer, splits)
    _silence(trainer)
    trainer.add_callback(bar)
    if recipe.max_step_kl is not None:
        trainer.add_callback(BoundedSteps(recipe.max_step_kl))
    with arguments.main_process_first(local=False):  # it removes what is half-written, the others find it gone
        checkpoint = last_whole_checkpoint(folder) if resume else None
    if recipe.data.start_rows is not None and checkpoint is None:
        start_from_gradients(trainer, recipe.data.start_rows)
    train_from(trainer, checkpoint)
    history = tuple(trainer.state.log_history)  # before the kept checkpoint is evaluated, under the last step's number
    validation = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    saved = folder / kept_folder(recipe)
    model: Any = trainer.model
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]  # of what was trained: a head is folded now
    fold_head(model)
    _save(trainer, saved)
    result = SeedResult(
        seed=arguments.seed,
        history=history,
        validation=_only_numbers(validation),
        best_step=kept_step(trainer),
        steps=trainer.state.max_steps,
        tests=_test(trainer, recipe, tokenizer, splits, options, saved, console),
        trained_parameters=sum(size for size, is_trained in counts if is_trained),
        all_parameters=sum(size for size, _ in counts),
    )
    if trainer.is_world_process_zero():
        result.write(folder / RESULTS)
    return result


def score_seed(
    recipe: Recipe,
    splits: Splits,
    arguments: TrainingArguments,
    options: EvaluationOptions,
    console: Console,
) -> SeedResult:
    """The result of a finished run, tested on what it saved if `run_seed` was given no tests; written again."""
    folder = Path(str(arguments.output_dir))
    result = read_result(folder / RESULTS)
    if result.tests or not splits.test:
        return result
    tokenizer = load_tokenizer(recipe, splits.task)
    few = dataclasses.replace(splits, train=shortest(splits.train), validation=shortest(splits.validation))
    trainer = make_trainer(dataclasses.replace(recipe, head=None), few, tokenizer, arguments)  # saved folded
    saved = folder / kept_folder(recipe)
    trainer._load_from_checkpoint(str(saved))
    tests = _test(trainer, recipe, tokenizer, splits, options, saved, console)
    _claim(folder.parent, recipe)  # its tests may have been added to it
    result = dataclasses.replace(result, tests=tests)
    result.write(folder / RESULTS)
    return result


def score_untrained(
    recipe: Recipe,  # without an adapter (`without_adapter`)
    splits: Splits,
    arguments: TrainingArguments,  # its folder, too
    options: EvaluationOptions,
    console: Console,
) -> SeedResult:
    """The result of the recipe's model as it is before training, validated and tested; written to the folder."""
    folder, tokenizer = Path(str(arguments.output_dir)), load_tokenizer(recipe, splits.task)
    few = dataclasses.replace(splits, train=shortest(splits.train))
    trainer = make_trainer(recipe, few, tokenizer, arguments)
    _silence(trainer)
    _claim(folder.parent, recipe)
    validation = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    tests = _test(trainer, recipe, tokenizer, splits, options, folder / WHOLE_MODEL, console)
    size = sum(p.numel() for p in trainer.model.parameters())  # pyright: ignore[reportOptionalMemberAccess]
    result = SeedResult(arguments.seed, (), _only_numbers(validation), None, 0, tests, 0, size)
    result.write(folder / RESULTS)
    return result


def _silence(trainer: Trainer) -> None:
    """Take away what prints and draws by itself."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def kept_folder(recipe: Recipe) -> str:
    """The folder of what a run keeps, in the run's own."""
    return WHOLE_MODEL if recipe.adapter is None else "adapter"


def _save(trainer: Trainer, folder: Path) -> None:
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        # A pickle: nobody who is given the adapter should have to trust it.
        (folder / "training_args.bin").unlink(missing_ok=True)


def _only_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    # TRL counts the tokens that this process has trained on, which are fewer after a resumption.
    timings = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time", "num_tokens")
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
        with console.status(plain(f"test: {name}, {len(examples)} rows")):
            found = evaluate_task(model, tokenizer, task, examples, options)
        write_json_lines(saved.with_name(f"predictions-{name}.jsonl"), found.rows)
        metrics[name] = dict(found.metrics)
    return metrics
