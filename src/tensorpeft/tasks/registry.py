"""Every task by name, as recipes and ``tensorpeft evaluate`` call it."""

import difflib

from tensorpeft.tasks import (
    arithmetic,
    cloze,
    commonsense,
    docstrings,
    glue,
    instructions,
    preferences,
    question_answering,
    signatures,
    structures,
    sums,
    texts,
)
from tensorpeft.tasks.task import Task

_MODULES = (
    docstrings,
    signatures,
    glue,
    commonsense,
    cloze,
    arithmetic,
    sums,
    question_answering,
    instructions,
    preferences,
    texts,
    structures,
)
TASKS: dict[str, Task] = {task.name: task for module in _MODULES for task in module.TASKS}


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(TASKS)}."
        raise ValueError(f"no task {name!r}. {hint}")
    return TASKS[name]
