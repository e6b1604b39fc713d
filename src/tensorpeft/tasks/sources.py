"""Sources of examples: published files, or the same data sets on the Hub; what two splits have in common."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorpeft.tasks.records import Record
from tensorpeft.tasks.task import Example, LabelledText, Preference, Question, Structure, StructureTask, Task

_HUB, _DROP, _ROWS = "hub", "drop", "rows"


def load_examples(
    task: Task,
    source: Any,  # a path, {"hub": name, ...}, or a list of such
) -> list[Example]:
    """The examples of a source, in its order.

    A mapping with ``hub`` names a data set of the Hub; ``drop`` ({column: [values]}) leaves rows out, ``rows`` takes
    the first ones only; all other keys are arguments of `datasets.load_dataset`, ``split`` among them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a row is malformed (names file, line and field), the source is none, or it holds no rows.
    """
    if isinstance(source, list | tuple):
        return [example for part in source for example in load_examples(task, part)]
    if isinstance(source, str | Path):
        if isinstance(task, StructureTask):
            examples: list[Example] = list(task.load(Path(source)))
        else:
            examples = [example for record in task.read(Path(source)) for example in task.parse(record)]
    elif isinstance(source, Mapping) and _HUB in source and not isinstance(task, StructureTask):
        examples = [example for record in _hub_records(dict(source)) for example in task.parse(record)]
    else:
        raise ValueError(
            f"task {task.name}: {source!r} is no source of data. Pass the path of a published file, or "
            "{hub: NAME, split: train}, or a list of these."
        )
    if not examples:
        raise ValueError(f"{source}: it holds no rows of the task {task.name}.")
    return examples


def _hub_records(arguments: dict[str, Any]) -> Iterator[Record]:
    from datasets import load_dataset

    name, drop, rows = arguments.pop(_HUB), arguments.pop(_DROP, None) or {}, arguments.pop(_ROWS, None)
    if "split" not in arguments:
        raise ValueError(f"{{hub: {name}}}: the split is missing. Add split: train, or the one you want.")
    table = load_dataset(name, **arguments)
    if rows is not None:
        table = table.select(range(min(rows, len(table))))
    dropped = 0
    for number, row in enumerate(table):
        record = Record(row, f"{name}, split {arguments['split']}, row {number}")
        if any(record.has(column) and row[column] in values for column, values in drop.items()):
            dropped += 1
            continue
        yield record
    if drop:
        print(f"{name}, split {arguments['split']}: {dropped} of {len(table)} rows left out by drop: {drop}")


def find_leaks(
    train: Sequence[Example],
    test: Sequence[Example],
) -> list[int]:  # indices into ``test``
    """The test examples whose text is also that of a training example, up to case and white space."""
    seen = {_text_of(example) for example in train}
    return [index for index, example in enumerate(test) if _text_of(example) in seen]


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
    return tuple(" ".join(part.lower().split()) for part in parts)
