"""A model evaluated on a task, whatever its kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tensorpeft.evaluation.chat_template import as_chat
from tensorpeft.evaluation.generation import evaluate_generation
from tensorpeft.evaluation.labels import evaluate_labels
from tensorpeft.evaluation.likelihood import check_choices, evaluate_likelihood
from tensorpeft.evaluation.loss import evaluate_loss
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.preferences import evaluate_preferences
from tensorpeft.evaluation.structures import evaluate_structures
from tensorpeft.plugin.evaluation_mode import evaluation_mode
from tensorpeft.tasks.task import Example, LabelTask, PreferenceTask, QuestionTask, StructureTask, Task

_DEFAULTS = EvaluationOptions()
_QUESTIONS = {"generate": evaluate_generation, "likelihood": evaluate_likelihood, "loss": evaluate_loss}
# What each mode looks at, of the options that others do not.
_LOOKS_AT = {
    "generate": ("max_length", "max_new_tokens", "num_beams"),
    "likelihood": ("max_length",),
    "loss": ("max_length",),
    "labels": ("max_length",),
    "preferences": ("max_length", "beta"),
    "structures": (),
}
_OTHERS = {LabelTask: "labels", PreferenceTask: "preferences", StructureTask: "structures"}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Args:
        task: its name.
        mode: "generate", "likelihood" or "loss" of questions, else "labels", "preferences" or "structures".
        num_rows: examples, those included that are marked ``left_out``.
        metrics: number by name.
        rows: one per example, in their order, of JSON types. ``cut``: only a part was within ``max_length``.
            ``left_out``: nothing was left to evaluate, and no metric counts the row.
    """

    task: str
    mode: str
    num_rows: int
    metrics: dict[str, float]
    rows: list[dict[str, Any]]

    @property
    def num_cut(self) -> int:
        """How many rows were cut to ``max_length``."""
        return sum(row.get("cut", False) for row in self.rows)

    @property
    def num_left_out(self) -> int:
        """How many rows no metric counts, because nothing was left of them."""
        return sum(row.get("left_out", False) for row in self.rows)


def evaluate_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,  # None: of structures, which need none
    task: Task,
    examples: Sequence[Example],
    options: EvaluationOptions = _DEFAULTS,
    on_row: Callable[[int], object] | None = None,  # called with the number of rows that are newly done
) -> Evaluation:
    """The metrics of a model on a task. Batching changes no result beyond rounding; the model is left as it was.

    Raises:
        ValueError: the mode does not suit the task, the model or the examples; there are no examples.
    """
    mode = find_mode(task, options)
    if not examples:
        raise ValueError(f"task {task.name}: no examples to evaluate, expected at least one.")
    report = on_row or (lambda number: None)
    rows: Any = examples
    words: Any = tokenizer
    with evaluation_mode(model):
        match task:
            case LabelTask():
                metrics, described = evaluate_labels(model, words, task, rows, options, report)
            case QuestionTask():
                asked = [as_chat(words, row) for row in rows] if options.chat else rows
                metrics, described = _QUESTIONS[mode](model, words, task, asked, options, report)
                described = [found | {"prompt": row.prompt} for found, row in zip(described, rows, strict=True)]
            case PreferenceTask():
                metrics, described = evaluate_preferences(model, words, task, rows, options, report)
            case StructureTask():
                metrics, described = evaluate_structures(model, task, rows, report)
    return Evaluation(task.name, mode, len(examples), metrics, described)


def find_mode(task: Task, options: EvaluationOptions) -> str:
    """How this task is evaluated with these options.

    Raises:
        ValueError: the task cannot be evaluated that way.
    """
    if not isinstance(task, QuestionTask):
        if options.mode is not None:
            raise ValueError(
                f"mode={options.mode!r}: only questions have modes, and {task.name} has none. Leave it out."
            )
        if options.chat:
            raise ValueError(f"chat=True: only questions are asked in a chat, and {task.name} has none. Leave it out.")
        return _OTHERS[type(task)]
    if options.mode == "generate" and task.score is None:
        raise ValueError(f"mode='generate': the task {task.name} cannot score a text. Use mode {task.mode or 'loss'}.")
    return options.mode or task.mode or ("loss" if task.score is None else "generate")


def check_options(task: Task, options: EvaluationOptions) -> None:
    """Refuse options that are not the defaults and would change nothing. In a recipe, which tests many tasks, they may.

    Raises:
        ValueError: there is one, or the task cannot be evaluated that way.
    """
    mode = find_mode(task, options)
    for name in sorted({name for names in _LOOKS_AT.values() for name in names} - {*_LOOKS_AT[mode]}):
        if (value := getattr(options, name)) != getattr(_DEFAULTS, name):
            raise ValueError(f"{name}={value!r}: it changes nothing with {task.name} (mode {mode}). Leave it out.")


def check_mode(task: Task, examples: Sequence[Example], options: EvaluationOptions) -> None:
    """What an evaluation would refuse without a model, long before there is one.

    Raises:
        ValueError: the mode does not suit the task or an example.
    """
    if find_mode(task, options) == "likelihood":
        for example in examples:
            check_choices(task, example)  # pyright: ignore[reportArgumentType]  # of a question task
