"""A recipe's ``trainer`` section as transformers' or TRL's arguments."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tensorpeft.tasks.task import PreferenceTask, QuestionTask, Task
from tensorpeft.training.fields import check_types
from tensorpeft.training.recipe import check_keys

# What a recipe has other names for.
_OWN = {"output_dir": "output", "seed": "seeds", "data_seed": "seeds", "resume_from_checkpoint": "--resume"}
_OWN |= {"reward_weights": "rewards"}
_TENTH = 0.1  # of all steps


def make_arguments(
    trainer: Mapping[str, Any],
    task: Task,
    folder: Path,  # of the checkpoints
    seed: int,
    rewards: Mapping[str, float] | None = None,  # weight by name, of the recipe
) -> TrainingArguments:
    """`trl.GRPOConfig` with rewards, `trl.SFTConfig` for questions, `trl.DPOConfig` for preferences, else
    `transformers.TrainingArguments`.

    Their defaults hold, but for these: the validation loss is taken ten times, a checkpoint is written each time, the
    best one is loaded at the end, of the others the last one is kept, the training loss is logged forty times, and
    nothing is reported to others. `data_seed` is the seed, `disable_tqdm` is set because the command has a bar of its
    own; `dataloader_pin_memory` and `use_cpu` are as the machine is; `ddp_timeout` is a week.

    Raises:
        ValueError: a name is unknown, is said elsewhere in a recipe, or the libraries refuse its value.
    """
    arguments_class = _arguments_class(task, rewards)
    known = [field.name for field in dataclasses.fields(arguments_class) if field.init]
    if own := [name for name in _OWN if name in trainer]:
        raise ValueError(f"trainer.{own[0]}: a recipe says this with {_OWN[own[0]]}. Remove it here.")
    check_keys(trainer, known, f"trainer ({arguments_class.__name__})")
    values = {field.name: field for field in dataclasses.fields(arguments_class)}
    # YAML reads an unquoted "no" as False.
    given: dict[str, Any] = {
        key: "no" if value is False and key.endswith("_strategy") else value
        for key, value in trainer.items()
        if value is not None or _may_be_none(values[key])
    }
    check_types(given, arguments_class, "trainer")
    _choose_checkpoints(given)
    if rewards is not None:
        given["reward_weights"] = [float(weight) for weight in rewards.values()]
    given.setdefault("logging_steps", _TENTH / 4)
    given.setdefault("report_to", "none")
    given.setdefault("disable_tqdm", True)
    given.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    given.setdefault("ddp_timeout", 7 * 24 * 3600)  # the others wait while the main process tests
    # Left to themselves, several processes without an accelerator train side by side and know nothing of each other.
    given.setdefault("use_cpu", not torch.accelerator.is_available())
    try:
        arguments = arguments_class(output_dir=str(folder), seed=seed, data_seed=seed, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"trainer ({arguments_class.__name__}): {error}") from None
    if arguments.max_steps == 0 or (arguments.max_steps < 0 and arguments.num_train_epochs <= 0):
        epochs, steps = arguments.num_train_epochs, arguments.max_steps
        raise ValueError(f"trainer: num_train_epochs={epochs}, max_steps={steps}: expected some steps of training.")
    return arguments


def _may_be_none(field: "dataclasses.Field[Any]") -> bool:
    """Whether None is a value of its own, such as TRL's max_length (cut nothing), and not the default once more."""
    return field.default is not None and "None" in str(field.type)


def _choose_checkpoints(given: dict[str, Any]) -> None:
    """Fill in when the validation loss is taken and a checkpoint written, so that the best one can be loaded."""
    by_epoch = given.get("save_strategy") == "epoch" and "eval_steps" not in given
    given.setdefault("eval_strategy", "epoch" if by_epoch else "steps")
    given.setdefault("save_strategy", given["eval_strategy"])
    if given["eval_strategy"] == "steps":
        given.setdefault("eval_steps", given.get("save_steps", _TENTH))
    if given["save_strategy"] == "steps":
        given.setdefault("save_steps", given.get("eval_steps", _TENTH))
    given.setdefault("save_total_limit", 1)
    is_evaluated = given["eval_strategy"] != "no"
    given.setdefault(
        "load_best_model_at_end", is_evaluated and given["save_strategy"] in (given["eval_strategy"], "best")
    )
    chooses = given["load_best_model_at_end"] or (is_evaluated and given["save_strategy"] == "best")
    given.setdefault("metric_for_best_model", "eval_loss" if chooses else None)


def _arguments_class(task: Task, rewards: Mapping[str, float] | None) -> type[TrainingArguments]:
    if rewards is not None:
        if not isinstance(task, QuestionTask):
            raise ValueError(f"rewards: only answers to questions are rewarded, {task.name} has none. Remove them.")
        from trl import GRPOConfig  # pyright: ignore[reportPrivateImportUsage]  # TRL imports it lazily

        return GRPOConfig
    if isinstance(task, QuestionTask):
        from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]  # TRL imports it lazily

        return SFTConfig
    if isinstance(task, PreferenceTask):
        from trl import DPOConfig  # pyright: ignore[reportPrivateImportUsage]  # TRL imports it lazily

        return DPOConfig
    return TrainingArguments
