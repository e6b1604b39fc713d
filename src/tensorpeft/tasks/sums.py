"""Sums of two digits: a task that is on every machine, and that a small chat model gets right now and then.

    What is 3 + 4? Answer:   ->   7

For reinforcement: the prompts are a dozen tokens, the answers one or two, and whether one is right needs no reference
text. All 81 pairs are rows; which are tested is drawn once, by a SHA-256. A sum and its reverse may be in two splits.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from tensorpeft.tasks.arithmetic import score_number
from tensorpeft.tasks.records import Record
from tensorpeft.tasks.stdlib import digest
from tensorpeft.tasks.task import Generation, Question, QuestionTask

_ROWS = {"test": slice(0, 24), "validation": slice(24, 40), "train": slice(40, None)}


def read_sums(
    path: Path,  # "sums:train", "sums:validation" or "sums:test"
) -> Iterator[Record]:
    """The rows of a split, in the order of a digest.

    Raises:
        ValueError: no such split.
    """
    source, _, split = str(path).partition(":")
    if source != "sums" or split not in _ROWS:
        raise ValueError(
            f"{path}: the task sums makes its rows itself. Expected one of "
            f"{', '.join(f'sums:{name}' for name in _ROWS)} as the source."
        )
    pairs = sorted(product(range(1, 10), repeat=2), key=lambda pair: digest(str(pair)))
    for index, (first, second) in enumerate(pairs[_ROWS[split]]):
        yield Record({"sum": f"{first} + {second}", "answer": str(first + second)}, f"{path}, row {index}")


def parse_sum(
    record: Record,  # fields ``sum`` and ``answer``
) -> Sequence[Question]:
    """The question of a row.

    Raises:
        ValueError: a field is missing, or no text.
    """
    answer = record.text("answer")
    return [Question(f"What is {record.text('sum')}? Answer:", f" {answer}", (answer,), key=record.place)]


TASKS = (
    QuestionTask(
        name="sums",
        description="The sum of two digits. Accuracy of the last number of the text.",
        read=read_sums,
        parse=parse_sum,
        generation=Generation(max_new_tokens=5),
        score=score_number,
    ),
)
