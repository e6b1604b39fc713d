"""Questions with choices: the likeliest choice is the model's answer."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tensorpeft.evaluation.batches import map_batches
from tensorpeft.evaluation.log_probs import make_log_probs
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.tokens import cut_start, encode_responses, find_limit
from tensorpeft.tasks.task import Question, QuestionTask


def evaluate_likelihood(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: QuestionTask,
    examples: Sequence[Question],
    options: EvaluationOptions,
    on_row: Callable[[int], object],
) -> tuple[dict[str, float], list[dict[str, Any]]]:  # metrics, rows
    """The share of questions of which a right choice has the largest log p(choice | prompt), also per character of it.

    The second measure does not prefer short choices; white space around a choice is no part of its length, as in
    lm-eval's ``acc`` and ``acc_norm``. Of equal choices the first one is the answer.

    Raises:
        ValueError: a question has no choices, or does not say which is right.
    """
    for example in examples:
        check_choices(task, example)
    limit = find_limit(model, tokenizer, options.max_length)
    groups = encode_responses(
        tokenizer, [example.prompt for example in examples], [example.choices for example in examples]
    )
    groups = [cut_start(group, limit, tokenizer) for group in groups]
    rows = [row for group in groups for row in group]
    owners = [index for index, group in enumerate(groups) for _ in group]
    missing = Counter(owners)

    def on_batch(indices: list[int]) -> None:
        missing.subtract(owners[index] for index in indices)
        complete = [owner for owner in {owners[index] for index in indices} if not missing[owner]]
        on_row(len(complete))

    lengths = [len(row.ids) for row in rows]
    sums = iter(map_batches(make_log_probs(model, tokenizer), rows, lengths, options.batch_size, on_batch))
    described: list[dict[str, Any]] = [
        _describe(example, [next(sums) for _ in group]) | ({"cut": True} if group[0].cut else {})
        for example, group in zip(examples, groups, strict=True)
    ]
    names = ("accuracy", "accuracy, by length")
    return {name: sum(row["metrics"][name] for row in described) / len(described) for name in names}, described


def check_choices(task: QuestionTask, example: Question) -> None:
    """Refuse a question that has no choices, a blank one, or does not say which is right.

    Raises:
        ValueError: it is such a question.
    """
    if not example.choices or example.gold is None or not 0 <= example.gold < len(example.choices):
        raise ValueError(
            f"task {task.name}, row {example.key!r}: got {len(example.choices)} choices and gold={example.gold}, "
            "expected choices and which of them is right. Use mode generate or loss."
        )
    if blank := [choice for choice in example.choices if not choice.strip()]:
        raise ValueError(f"task {task.name}, row {example.key!r}: the choice {blank[0]!r} is blank, expected a text.")


def _describe(example: Question, log_probs: list[float]) -> dict[str, Any]:
    right = (example.gold, *example.also_gold)
    by_length = [p / len(choice.strip()) for p, choice in zip(log_probs, example.choices, strict=True)]
    best, best_by_length = (max(range(len(scores)), key=scores.__getitem__) for scores in (log_probs, by_length))
    return {
        "key": example.key,
        "prompt": example.prompt,
        "choices": list(example.choices),
        "log_probs": log_probs,
        "prediction": best,
        "prediction_by_length": best_by_length,
        "gold": example.gold,
        "metrics": {
            "accuracy": float(best in right),
            "accuracy, by length": float(best_by_length in right),
        },
    }
