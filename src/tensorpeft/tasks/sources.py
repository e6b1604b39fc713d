"""Sources of examples: published files, or the same data sets on the Hub; what two splits have in common."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tensorpeft.tasks.records import Record
from tensorpeft.tasks.task import Example, LabelledText, Preference, Question, Structure, StructureTask, Task

_HUB, _DROP, _ROWS = "hub", "drop", "rows"


def load_examples(
    task: Task,
    source: Any,  # a path, {"hub": name, ...}, or a list of such
) -> list[Example]:
    """The examples of a source, in its order.

    A mapping with ``hub`` names a data set of the Hub; ``rows`` takes the first ones only, of which ``drop``
    ({column: [values]}) leaves some out; all other keys are arguments of `datasets.load_dataset`, ``split`` among them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a row is malformed (names file, line and field), the source is none, or it holds no rows.
    """
    if isinstance(source, list | tuple) and source:
        return [example for part in source for example in load_examples(task, part)]
    if isinstance(source, str | Path):
        if isinstance(task, StructureTask):
            examples: list[Example] = list(task.load(Path(source)))
        else:
            examples = [example for record in task.read(Path(source)) for example in task.parse(record)]
    elif isinstance(source, Mapping) and _HUB in source and not isinstance(task, StructureTask):
        examples = [example for record in _hub_records(dict(source)) for example in task.parse(record)]
    else:
        hub = "" if isinstance(task, StructureTask) else ", or {hub: NAME, split: train}"
        raise ValueError(
            f"task {task.name}: {source!r} is no source of data. Pass the path of a published file{hub}, or a list of "
            "these."
        )
    if not examples:
        raise ValueError(f"{source}: it holds no rows of the task {task.name}.")
    return examples


def _hub_records(arguments: dict[str, Any]) -> Iterator[Record]:
    from datasets import load_dataset

    name, drop, rows = arguments.pop(_HUB), arguments.pop(_DROP, None) or {}, arguments.pop(_ROWS, None)
    if arguments.get("split") is None:
        raise ValueError(f"{{hub: {name}}}: the split is missing. Add split: train, or the one you want.")
    place = f"{name}, split {arguments['split']}"
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise ValueError(f"{place}: rows={rows!r}: expected a whole number, at least 1, or null.")
    if not isinstance(drop, Mapping) or not all(isinstance(values, list | tuple) for values in drop.values()):
        raise ValueError(f"{place}: drop={drop!r}: expected a list of values by column, such as {{status: [tie]}}.")
    seen = dropped = 0
    try:
        table = load_dataset(name, **arguments)
    except RuntimeError as error:  # a data set of the Hub that is a script
        raise ValueError(f"{place}: {error}. Try revision: refs/convert/parquet, or a published file.") from None
    for seen, row in enumerate(islice(table, rows), 1):
        record = Record(row, f"{place}, row {seen - 1}")
        if missing := [column for column in drop if not record.has(column)]:
            raise ValueError(f"{place}: drop has the column {missing[0]}; expected one of {', '.join(row)}.")
        if any(row[column] in values for column, values in drop.items()):
            dropped += 1
            continue
        yield record
    if drop:
        print(f"{place}: {dropped} of {seen} rows left out by drop: {drop}")


def find_leaks(
    train: Sequence[Example],
    test: Sequence[Example],
) -> list[int]:  # indices into ``test``
    """The test examples whose text is also that of a training example, up to case and white space."""
    seen = {_text_of(example) for example in train}
    return [index for index, example in enumerate(test) if _text_of(example) in seen]


def digest(examples: Sequence[Example]) -> str:
    """What tells these examples, in their order, from others, wherever they are read from: their keys name places."""
    found = hashlib.sha256()
    for example in examples:
        for field in dataclasses.fields(example):
            if field.name != "key":
                value = getattr(example, field.name)
                found.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
                found.update(b"\0")
    return found.hexdigest()


def _text_of(example: Example) -> tuple[str, ...]:
    """What the model is given; for plain text, which has no prompt, the text itself."""
    match example:
        case LabelledText(texts=texts):
            parts = texts
        case Question(prompt=prompt, response=response):
            parts = (prompt or response,)
        case Preference(prompt=prompt):
            parts = (prompt,)
        case Structure(sequence=sequence):
            parts = (sequence,)
    return tuple(" ".join(part.casefold().split()) for part in parts)
