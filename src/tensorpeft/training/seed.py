"""The run of one seed of a recipe: trained, kept, tested; killed at any moment, it goes on where it stood."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock
from omegaconf import OmegaConf
from peft import PeftModel
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from tensorpeft import BoundedSteps
from tensorpeft.evaluation.evaluate import evaluate_task
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.reports.files import write_json, write_json_lines, write_lines
from tensorpeft.reports.terminal import plain
from tensorpeft.reports.versions import find_versions
from tensorpeft.training.checkpoints import kept_step, last_whole_checkpoint, train_from
from tensorpeft.training.head import fold_head
from tensorpeft.training.models import load_tokenizer
from tensorpeft.training.recipe import RECIPE_FILE, Recipe
from tensorpeft.training.results import SeedResult, read_result
from tensorpeft.training.sharding import prepare_sharding, whole_model
from tensorpeft.training.splits import Splits, describe_source, shortest
from tensorpeft.training.start import start_from_gradients
from tensorpeft.training.trainers import make_trainer, tell_dropped_rows

RESULTS = "results.json"
WHOLE_MODEL = "model"
_ROWS = "rows.json"  # digests of what was read, beside the recipe


def _claim(
    output: Path,
    recipe: Recipe,
    digests: Mapping[str, str] = MappingProxyType({}),  # of the rows that are looked at, by split
) -> None:
    """Make the folder that of this recipe and these rows: from here on it holds a run."""
    file, text = output / RECIPE_FILE, f"{recipe.to_yaml().rstrip()}\n"
    output.mkdir(parents=True, exist_ok=True)
    # Other seeds may run at the same time, and do the same.
    with FileLock(output / f".{RECIPE_FILE}.lock"):
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_lines(file, text.splitlines())
        if (known := {**_read_digests(output), **digests}) != _read_digests(output):
            write_json(output / _ROWS, known)


def _read_digests(output: Path) -> dict[str, str]:
    """Of the rows that a folder's run has read; of one that is older than the record of them, none."""
    file = output / _ROWS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check_rows(
    output: Path,
    recipe: Recipe,
    digests: Mapping[str, str],  # of the rows that the recipe names, as they are now
) -> None:
    """Refuse to go on with other rows under the same names.

    Raises:
        ValueError: a split is another one than the folder's run has read; names its source.
    """
    for split, found in _read_digests(output).items():
        if digests.get(split, found) != found:
            name = split.partition(" ")[0]
            source = describe_source(getattr(recipe.data, name))
            raise ValueError(
                f"data.{name} ({source}): the rows of {split} are others than those that the run in {output} has read. "
                "Put the data back as it was, or pass another folder (output=FOLDER, compare: --output FOLDER)."
            )


def check_output(
    output: Path,
    recipe: Recipe,
    resume: bool,
    is_tested_later: bool = False,  # a run without tests may be given some, by `score_seed`
    at_any_rate: bool = False,  # its learning rate may be another one
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
    for trainer in (found["trainer"], wanted["trainer"]) if at_any_rate else ():
        trainer.pop("learning_rate", None)
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
    check_rows(folder.parent, recipe, splits.digests)
    if resume and (folder / RESULTS).is_file():
        return read_result(folder / RESULTS)
    tokenizer = load_tokenizer(recipe, splits.task)
    trainer = make_trainer(recipe, splits, tokenizer, arguments)
    prepare_sharding(trainer, recipe, splits.task)
    if trainer.is_world_process_zero():
        # Not before: a model or an adapter that cannot be made leaves no run behind.
        _claim(folder.parent, recipe, _seen(splits))
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
    trained_parameters, all_parameters = _count(model)  # of what was trained: a head is folded now
    fold_head(model)
    _save(trainer, saved)
    result = SeedResult(
        seed=arguments.seed,
        history=history,
        validation=_only_numbers(validation),
        best_step=kept_step(trainer),
        steps=trainer.state.max_steps,
        tests=_test(trainer, recipe, tokenizer, splits, options, saved, console),
        trained_parameters=trained_parameters,
        all_parameters=all_parameters,
        versions=find_versions(),
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
    check_rows(folder.parent, recipe, splits.digests)
    tokenizer = load_tokenizer(recipe, splits.task)
    few = dataclasses.replace(splits, train=shortest(splits.train), validation=shortest(splits.validation))
    trainer = make_trainer(dataclasses.replace(recipe, head=None), few, tokenizer, arguments)  # saved folded
    saved = folder / kept_folder(recipe)
    trainer._load_from_checkpoint(str(saved))
    tests = _test(trainer, recipe, tokenizer, splits, options, saved, console)
    _claim(folder.parent, recipe, _seen(splits))  # its tests may have been added to it
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
    check_rows(folder.parent, recipe, splits.digests)
    few = dataclasses.replace(splits, train=shortest(splits.train))
    trainer = make_trainer(recipe, few, tokenizer, arguments)
    _silence(trainer)
    _claim(folder.parent, recipe, {split: found for split, found in _seen(splits).items() if split != "train"})
    validation = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    tests = _test(trainer, recipe, tokenizer, splits, options, folder / WHOLE_MODEL, console)
    _, size = _count(trainer.model)
    result = SeedResult(arguments.seed, (), _only_numbers(validation), None, 0, tests, 0, size, find_versions())
    result.write(folder / RESULTS)
    return result


def _count(model: Any) -> tuple[int, int]:  # trained, all
    """Parameters as PEFT counts them, also without an adapter: of weights in 4 bits two are one number of torch's."""
    return PeftModel.get_nb_trainable_parameters(model)


def _seen(splits: Splits) -> dict[str, str]:
    """The digests of the splits that a run is given: its tests may be kept from it."""
    tests = {f"test ({name})" for name in splits.test}
    return {split: found for split, found in splits.digests.items() if not split.startswith("test") or split in tests}


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
