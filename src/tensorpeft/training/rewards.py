"""What an answer that a model drew is worth: the rewards of reinforcement learning, by name.

``answer`` is the task's own metric: whether the answer is right, as the task's test judges it. ``format`` is 1 where
the task finds an answer in the text at all, right or wrong: a label, a number, a box, whatever it looks for.
``MODULE:FUNCTION`` is a function of the user's, or of a library, called as TRL calls its reward functions: with the
lists ``prompts``, ``completions`` and ``completion_ids``, a list for every field of `tensorpeft.tasks.task.Question`,
and more that is to be ignored (``**more``); it returns a number for every completion.
"""

import math
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

from tensorpeft.evaluation.generation import cut_at
from tensorpeft.tasks.task import Question, QuestionTask, Scored, Task

Reward = Callable[..., list[float]]  # as TRL calls it
# In their order; of the choices a text that is judged needs no more than these.
_FIELDS = [field.name for field in fields(Question) if field.name not in ("prompt", "also_gold")]
_NAMED: dict[str, Callable[[Scored], float]] = {
    "answer": lambda scored: next(iter(scored.metrics.values())),
    "format": lambda scored: float(scored.answer is not None),
}


def find_rewards(
    names: Iterable[str],  # of a recipe's rewards
    task: Task,
) -> list[Reward]:
    """The reward functions of these names, each called by its name in logs and reports.

    Raises:
        ValueError: there is no such reward or function, or the task has no right answers.
    """
    return [_find_reward(str(name), task) for name in names]


def _find_reward(name: str, task: Task) -> Reward:
    if name in _NAMED:
        assert isinstance(task, QuestionTask)
        if task.score is None:
            raise ValueError(
                f"rewards.{name}: the task {task.name} has no right answers. Choose another task, or a function of "
                "your own, MODULE:FUNCTION."
            )
        return _called(name, _by_score(task, task.score, _NAMED[name]))
    if ":" not in name:
        raise ValueError(f"rewards: no reward {name!r}. Known are {', '.join(_NAMED)}, and MODULE:FUNCTION.")
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # whatever a module of the user's does
        raise ValueError(
            f"rewards.{name}: {type(error).__name__}: {error}. Expected MODULE:FUNCTION, of a module that Python "
            "finds; PYTHONPATH=FOLDER shows it one."
        ) from error
    if not callable(function):
        raise ValueError(f"rewards.{name}: it is {type(function).__name__}, expected a function.")
    return _called(name, _checked(name, function))


def _called(name: str, reward: Reward) -> Reward:
    reward.__name__ = name
    return reward


def _by_score(task: QuestionTask, score: Callable[[str, Question], Scored], value: Callable[[Scored], float]) -> Reward:
    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        rows = zip(*(columns[name] for name in _FIELDS), strict=True)
        questions = [Question(prompt, *map(_frozen, row)) for prompt, row in zip(prompts, rows, strict=True)]
        texts = [cut_at(text, task.generation.stop) for text in completions]
        return [value(score(text, question)) for text, question in zip(texts, questions, strict=True)]

    return reward


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _checked(name: str, function: Callable[..., Any]) -> Reward:
    """A function whose mistakes are told as the recipe's."""

    def reward(**arguments: Any) -> list[float]:
        try:
            found = [float(value) for value in function(**arguments)]
        except Exception as error:
            raise ValueError(f"rewards.{name}: {type(error).__name__}: {error}") from error
        wanted = len(arguments["completions"])
        if len(found) != wanted or not all(map(math.isfinite, found)):
            raise ValueError(
                f"rewards.{name}: it returned {found}, expected {wanted} finite numbers, one per completion."
            )
        return found

    return reward
