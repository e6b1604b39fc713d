"""The trainer of a recipe: `transformers.Trainer` for labels, TRL's SFT, DPO and GRPO trainers for language."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tensorpeft.evaluation.chat_template import as_chat, find_turn_end
from tensorpeft.evaluation.tokens import find_limit
from tensorpeft.models.folding import collate_structures
from tensorpeft.tasks.task import LabelTask, PreferenceTask, QuestionTask, Structure, StructureTask
from tensorpeft.training.head import is_head
from tensorpeft.training.models import adapt, adapter_config, load_base
from tensorpeft.training.recipe import DataRecipe, Recipe
from tensorpeft.training.rewards import find_rewards
from tensorpeft.training.splits import Splits


class HeadRateTrainer(Trainer):
    """A Trainer of a model whose loss is a mean, and whose new head may have a learning rate of its own.

    Args:
        head_learning_rate: of the parameters of the head; None: that of the others.
        **arguments: of `transformers.Trainer`.
    """

    def __init__(self, head_learning_rate: float | None = None, **arguments: Any) -> None:
        self.head_learning_rate = head_learning_rate
        super().__init__(**arguments)
        # It takes a forward with **kwargs for one that divides the sum by the rows of all processes and accumulated
        # batches; a classifier's takes the mean over its own, and would train on so many times its loss.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser of the arguments, the groups of its parameters split where the rates differ."""
        optimizer = super().create_optimizer(model)
        if self.head_learning_rate is not None:
            trained: Any = self.model if model is None else model
            head = {id(p) for name, p in trained.named_parameters() if is_head(name, trained)}
            groups = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for group in groups:
                for in_head, rate in ((False, group["lr"]), (True, self.head_learning_rate)):
                    chosen = [p for p in group["params"] if (id(p) in head) == in_head]
                    if chosen:
                        optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        return optimizer


def make_trainer(
    recipe: Recipe,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase | None,  # None: the task is no text
    arguments: TrainingArguments,
) -> Trainer:
    """A trainer with the recipe's model, adapted, that has not run yet.

    Raises:
        ValueError: a value of the recipe is one that PEFT, transformers or TRL cannot use.
    """
    # A model in 4 bits, or in mixed precision, refers to itself: the last seed's would stay beside this one.
    clear_device_cache(garbage_collection=True)
    try:
        return _make_trainer(recipe, splits, tokenizer, arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, re.error) as error:
        # These libraries check few values; what they do with a wrong one is any of these errors.
        raise ValueError(
            f"adapter or trainer of the recipe: a value that the libraries cannot use: {type(error).__name__}: {error}"
        ) from error


def _make_trainer(
    recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase | None, arguments: TrainingArguments
) -> Trainer:
    base = load_base(recipe, splits.task, tokenizer, arguments.seed)
    set_seed(arguments.seed)
    match splits.task:
        case LabelTask():
            assert tokenizer is not None
            return _label_trainer(adapt(base, recipe, splits.task), recipe, splits, tokenizer, arguments)
        case StructureTask():
            return _structure_trainer(adapt(base, recipe, splits.task), recipe, splits, arguments)
        case QuestionTask() if recipe.rewards is not None:
            make, rows = partial(_grpo_trainer, recipe, splits.task), _asked_rows
        case QuestionTask():
            make, rows = _sft_trainer, _question_rows
        case PreferenceTask():
            make, rows = _dpo_trainer, _preference_rows
    exact = {} if recipe.quantize is None else _fresh_adapter(base, recipe, splits, arguments.seed)
    trainer = make(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list(rows(splits.train, recipe.data, tokenizer)),
        eval_dataset=Dataset.from_list(rows(splits.validation, recipe.data, tokenizer)),
        processing_class=tokenizer,
        peft_config=adapter_config(recipe, splits.task),
    )
    for name, parameter in trainer.model.named_parameters():  # pyright: ignore[reportOptionalMemberAccess]
        if name in exact:
            parameter.data = exact[name]
    return trainer


def _fresh_adapter(base: Any, recipe: Recipe, splits: Splits, seed: int) -> dict[str, torch.Tensor]:
    """The trained parameters of a new adapter, as they are before TRL rounds them.

    On a base in 4 bits TRL casts them to bfloat16, as QLoRA's paper does for LoRA: small updates would be lost, and
    PiSSA's start, which TRL does not know. What is the difference to a start puts itself back (`AbstractDifference`).
    """
    adapted: Any = adapt(base, recipe, splits.task)
    values = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.unload()
    set_seed(seed)
    return values


def _label_trainer(
    model: Any,
    recipe: Recipe,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
) -> Trainer:
    task = splits.task
    assert isinstance(task, LabelTask)

    def scores(predicted: EvalPrediction) -> dict[str, float]:
        logits = np.asarray(predicted.predictions)
        values = logits.argmax(-1) if task.label_names else logits.squeeze(-1)
        labels = np.asarray(predicted.label_ids)
        return {name: float(metric(labels.tolist(), values.tolist())) for name, metric in task.metrics.items()}

    limit = find_limit(model, tokenizer, recipe.data.max_length)  # as the tests have it
    return HeadRateTrainer(
        head_learning_rate=recipe.head_learning_rate,
        model=model,
        args=arguments,
        train_dataset=_label_rows(splits.train, task, tokenizer, limit),
        eval_dataset=_label_rows(splits.validation, task, tokenizer, limit),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores,
    )


def _label_rows(
    examples: Sequence[Any],  # LabelledText
    task: LabelTask,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> Dataset:
    first, *pair = (list(column) for column in zip(*(example.texts for example in examples), strict=True))
    rows = tokenizer(first, text_pair=pair[0] if pair else None, truncation=True, max_length=max_length)
    labels = [int(example.label) if task.label_names else float(example.label) for example in examples]
    return Dataset.from_dict({**rows, "labels": labels})


def _structure_trainer(model: Any, recipe: Recipe, splits: Splits, arguments: TrainingArguments) -> Trainer:
    arguments.remove_unused_columns = False  # the rows are chains, not columns of the model's arguments
    return HeadRateTrainer(
        head_learning_rate=recipe.head_learning_rate,
        model=model,
        args=arguments,
        train_dataset=_chains(splits.train, recipe.data.max_length),
        eval_dataset=_chains(splits.validation, recipe.data.max_length),
        data_collator=collate_structures,
    )


def _chains(examples: Sequence[Any], max_length: int | None) -> list[Structure]:
    return [_crop(chain, max_length) for chain in examples]


def _crop(chain: Structure, max_length: int | None) -> Structure:
    """The stretch of so many residues with the most that are resolved: the head's memory grows with their cube."""
    length = len(chain.sequence)
    if max_length is None or length <= max_length:
        return chain
    resolved = np.concatenate([[0], np.cumsum(np.isfinite(chain.positions).all((1, 2)))])
    start = int(np.argmax(resolved[max_length:] - resolved[:-max_length]))
    stretch = slice(start, start + max_length)
    return Structure(chain.sequence[stretch], chain.positions[stretch], f"{chain.key}, from residue {start + 1}")


def _question_rows(examples: Sequence[Any], data: DataRecipe, tokenizer: Any) -> list[dict[str, str]]:
    """TRL's rows: a prompt with its completion, or one text where the loss is on all of it.

    A chat, too, is plain text here, not TRL's conversations: it is the same text that the evaluation writes, and its
    last token is the one that ends a turn.
    """
    if data.chat:
        examples = [as_chat(tokenizer, example) for example in examples]
    if data.loss_on == "text" or not any(example.prompt for example in examples):
        return [{"text": example.prompt + example.response} for example in examples]
    return [{"prompt": example.prompt, "completion": example.response} for example in examples]


def _asked_rows(examples: Sequence[Any], data: DataRecipe, tokenizer: Any) -> list[dict[str, Any]]:
    """Every field of the questions, for rewards to judge by."""
    if empty := [example.key for example in examples if not example.prompt]:
        raise ValueError(f"rewards: row {empty[0]!r} has no prompt to answer. Choose a task of questions.")
    return [asdict(as_chat(tokenizer, example) if data.chat else example) for example in examples]


def _preference_rows(examples: Sequence[Any], data: DataRecipe, tokenizer: Any) -> list[dict[str, str]]:
    return [{"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected} for e in examples]


def _sft_trainer(**arguments: Any) -> Trainer:
    from trl.trainer.sft_trainer import SFTTrainer

    trainer = SFTTrainer(**arguments)
    _check_left_rows(trainer, arguments)
    return trainer


def _dpo_trainer(**arguments: Any) -> Trainer:
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = DPOTrainer(**arguments)
    _check_left_rows(trainer, arguments)
    return trainer


def _grpo_trainer(recipe: Recipe, task: QuestionTask, **arguments: Any) -> Trainer:
    from tensorpeft.training.reinforcement import RewardTrainer  # here, because it imports TRL

    assert recipe.rewards is not None
    if recipe.data.chat:
        # TRL ends an answer where the model or its tokenizer does; this is where the chat template does.
        settings, end = arguments["model"].generation_config, find_turn_end(arguments["processing_class"])
        own = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        settings.eos_token_id = sorted({token for token in (*own, end) if token is not None}) or None
    functions: Any = find_rewards(recipe.rewards, task)  # TRL's own type has None in it, for rewards that do not apply
    return RewardTrainer(reward_funcs=functions, **arguments)


def _check_left_rows(trainer: Any, arguments: dict[str, Any]) -> None:
    for name in ("train_dataset", "eval_dataset"):
        if not getattr(trainer, name):
            raise ValueError(
                f"none of the {len(arguments[name])} rows of {name} is left: their prompts alone fill "
                f"trainer.max_length={trainer.args.max_length}. Pass a larger trainer.max_length."
            )


def tell_dropped_rows(trainer: Any, splits: Splits) -> None:
    """TRL drops rows of which ``max_length`` leaves nothing to learn, and does not say so."""
    if not trainer.is_world_process_zero():
        return
    packs = getattr(trainer.args, "packing", False)
    packs_eval = getattr(trainer.args, "eval_packing", None)
    for name, rows, is_packed in (
        ("train_dataset", splits.train, packs),
        ("eval_dataset", splits.validation, packs if packs_eval is None else packs_eval),
    ):
        if not is_packed and (kept := len(getattr(trainer, name))) < len(rows):
            print(
                f"{len(rows) - kept} of {len(rows)} rows of {name} left out: their prompts alone fill "
                f"trainer.max_length={trainer.args.max_length}."
            )
