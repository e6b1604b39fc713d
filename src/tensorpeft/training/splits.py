"""The rows of a recipe: read, drawn, and looked over for test rows that are also trained on."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.sources import digest, find_leaks, load_examples
from tensorpeft.tasks.task import Example, LabelTask, StructureTask, Task
from tensorpeft.training.recipe import DataRecipe, Recipe

_FEW = 256  # rows


@dataclass(frozen=True)
class Leak:
    """Rows of one split whose text is trained on, too.

    Args:
        split: "validation", or "test (NAME)" with the name of the test's task.
        num_rows: of the split.
        rows: which of them, by index.
    """

    split: str
    num_rows: int
    rows: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:5])) + (", …" if len(self.rows) > 5 else "")
        return f"{len(self.rows)} of {self.num_rows} {self.split} rows are training rows, too (rows {shown})"


@dataclass(frozen=True)
class Splits:
    """What a run trains on, chooses its checkpoint on, and is tested on.

    Args:
        task: of training and validation.
        train: training rows.
        validation: their loss chooses the checkpoint.
        test: task and rows by name.
        leaks: one per split that has rows in common with ``train``.
        digests: of the rows that were read, by split: "train", "validation", "test (NAME)".
    """

    task: Task
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Mapping[str, tuple[Task, Sequence[Example]]]
    leaks: tuple[Leak, ...]
    digests: Mapping[str, str] = field(default_factory=dict)


def load_splits(recipe: Recipe) -> Splits:
    """The rows that a recipe names; the same rows for each of its seeds.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a row is malformed, there are fewer rows than the recipe asks for, or a model for the recipe's task
            cannot be tested on another task.
    """
    task, data = find_task(recipe.task), recipe.data
    rows = load_examples(task, data.train)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(data.seed)).tolist()
    if isinstance(data.validation, int):
        _check_count(data.validation + 1, rows, f"data.validation={data.validation}")
        validation, order = [rows[i] for i in order[: data.validation]], order[data.validation :]
    else:
        validation = load_examples(task, data.validation)[: data.validation_rows]
    if data.train_rows is not None:
        _check_count(data.train_rows, order, f"data.train_rows={data.train_rows}")
        order = order[: data.train_rows]
    train = [rows[i] for i in order]
    test = _load_tests(task, data)
    splits = {"validation": validation} | {f"test ({name})": examples for name, (_, examples) in test.items()}
    leaks = [Leak(name, len(examples), tuple(find_leaks(train, examples))) for name, examples in splits.items()]
    digests = {name: digest(examples) for name, examples in {"train": train, **splits}.items()}
    return Splits(task, train, validation, test, tuple(leak for leak in leaks if leak.rows), digests)


def shortest(rows: Sequence[Example], num: int = _FEW) -> Sequence[Example]:
    """A few rows for a trainer that prepares all that it is given and looks at none of them.

    Those with prompts first: with none among them TRL's loss, that of validation too, would be on whole texts. Of these
    the shortest: a row that ``max_length`` leaves out is refused if it is all that there is.
    """

    def place(row: Example) -> tuple[bool, int]:
        prompt = getattr(row, "prompt", "")
        return not prompt, len(prompt)

    return heapq.nsmallest(num, rows, key=place)


def _load_tests(trained: Task, data: DataRecipe) -> dict[str, tuple[Task, Sequence[Example]]]:
    if data.test is None:
        return {}
    by_task = isinstance(data.test, Mapping) and "hub" not in data.test
    sources: Mapping[str, Any] = data.test if by_task else {trained.name: data.test}
    tests = {}
    for name, source in sources.items():
        task = find_task(name)
        if _head_of(task) != _head_of(trained):
            raise ValueError(f"data.test.{name}: a model for {trained.name} has no head for {name}. Leave it out.")
        tests[name] = (task, load_examples(task, source)[: data.test_rows])
    return tests


def _head_of(task: Task) -> str | tuple[str, ...]:
    """What a model has for a task: its classes, a folding head, or that of a language model."""
    if isinstance(task, LabelTask):
        return task.label_names
    return "folding" if isinstance(task, StructureTask) else "language"


def _check_count(wanted: int, rows: Sequence[Any], what: str) -> None:
    if wanted > len(rows):
        raise ValueError(f"{what}: expected at least {wanted} rows, got {len(rows)}. Ask for fewer.")


def describe_source(source: Any) -> str:
    """A source as a report calls it: a file's name without its folders, or the Hub's name and split."""
    if isinstance(source, list | tuple):
        return ", ".join(describe_source(part) for part in source)
    if isinstance(source, Mapping) and "hub" in source:
        return " ".join(str(source[key]) for key in ("hub", "name", "split") if key in source)
    if isinstance(source, Mapping):
        return "; ".join(f"{name}: {describe_source(part)}" for name, part in source.items())
    if isinstance(source, int):
        return "the training source, drawn before the training rows"
    path = Path(source)
    return "/".join(name for name in (path.parent.name, path.name) if name)
