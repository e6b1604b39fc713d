"""Classification and regression: logits, predictions, the task's metrics."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tensorpeft.evaluation.batches import map_batches
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.tokens import base_model, device_of, find_limit, pad_batch
from tensorpeft.tasks.task import LabelledText, LabelTask


def evaluate_labels(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: LabelTask,
    examples: Sequence[LabelledText],
    options: EvaluationOptions,
    on_row: Callable[[int], object],
) -> tuple[dict[str, float], list[dict[str, Any]]]:  # metrics, rows
    """The task's metrics, and the mean loss: cross-entropy in nats, or the squared error of a number.

    Raises:
        ValueError: the model has another number of outputs than the task has classes.
    """
    encoded, is_cut = _encode(tokenizer, examples, find_limit(model, tokenizer, options.max_length))
    device, order = device_of(model), _order_of_outputs(model, task)

    @torch.no_grad()
    def compute(batch: list[dict[str, list[int]]]) -> list[Tensor]:
        return model(**pad_batch(batch, tokenizer, device)).logits[:, order].float().cpu().unbind()

    lengths = [len(row["input_ids"]) for row in encoded]
    logits = torch.stack(
        map_batches(compute, encoded, lengths, options.batch_size, lambda indices: on_row(len(indices)))
    )
    labels = [int(example.label) if task.label_names else float(example.label) for example in examples]
    if task.label_names:
        predictions = logits.argmax(-1).tolist()
        losses = F.cross_entropy(logits, torch.tensor(labels), reduction="none").tolist()
    else:
        predictions = logits[:, 0].tolist()
        losses = [(prediction - label) ** 2 for prediction, label in zip(predictions, labels, strict=True)]
    metrics = {name: float(metric(labels, predictions)) for name, metric in task.metrics.items()}
    metrics["loss"] = sum(losses) / len(losses)
    rows = [
        _describe(task, example, label, prediction, loss) | ({"cut": True} if cut else {})
        for example, label, prediction, loss, cut in zip(examples, labels, predictions, losses, is_cut, strict=True)
    ]
    return metrics, rows


def _encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[LabelledText], limit: int | None
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """The model's arguments for every example, and which of them were cut."""
    encode: Any = partial(tokenizer, return_attention_mask=True, verbose=False)
    columns = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
    whole = encode(*columns)
    rows = [dict(zip(whole.keys(), row, strict=True)) for row in zip(*whole.values(), strict=True)]
    is_cut = [limit is not None and len(row["input_ids"]) > limit for row in rows]
    for index in (index for index, cut in enumerate(is_cut) if cut):
        # By the tokenizer, which keeps its special tokens, and of a pair cuts the longer text.
        rows[index] = dict(encode(*examples[index].texts, truncation=True, max_length=limit))
    return rows, is_cut


def _order_of_outputs(model: nn.Module, task: LabelTask) -> list[int]:
    """Which output of the model is which class of the task: the same order, unless the model names them otherwise."""
    config = base_model(model).config
    expected = max(len(task.label_names), 1)
    if config.num_labels != expected:
        classes = f"classes ({', '.join(task.label_names)})" if task.label_names else "number"
        raise ValueError(
            f"task {task.name}: the model has {config.num_labels} outputs, expected {expected} {classes}. Pass a model "
            f"with a head of this task, or load it with num_labels={expected}."
        )
    wanted = [name.casefold() for name in task.label_names]
    found = [str((config.id2label or {}).get(index, index)).casefold() for index in range(expected)]
    if wanted and len(set(wanted)) == expected and set(found) == set(wanted):
        return [found.index(name) for name in wanted]
    return list(range(expected))


def _describe(task: LabelTask, example: LabelledText, label: Any, prediction: Any, loss: float) -> dict[str, Any]:
    row: dict[str, Any] = {"texts": list(example.texts), "label": label, "prediction": prediction, "loss": loss}
    if task.label_names:
        row |= {"label_name": task.label_names[label], "prediction_name": task.label_names[prediction]}
    return row
