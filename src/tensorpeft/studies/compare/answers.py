"""What was answered: some test questions with each model's answer, the untrained one's first, side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tensorpeft.reports.tables import Table, one_line

_LONGEST = 160  # characters of a text that is shown; a model that does not find an end fills pages


@dataclass(frozen=True)
class Answer:
    """What one model answered.

    Args:
        label: of the model.
        text: what it wrote.
        score: of the task's main metric, 1 is right.
    """

    label: str
    text: str
    score: float

    @property
    def mark(self) -> str:
        """Right, wrong, or the score of what is neither."""
        return {1.0: "✓", 0.0: "✗"}.get(self.score, f"{self.score:.2f}")


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question of a test, and all answers to it.

    Args:
        prompt: what was asked.
        expected: one of the right answers; "": there is none.
        answers: one per model.
    """

    prompt: str
    expected: str
    answers: tuple[Answer, ...]


def read_answers(
    predictions: Sequence[tuple[str, Path]],  # a model's label, and what a test wrote of it (predictions-TEST.jsonl)
    count: int,  # of the first questions
) -> list[AnsweredQuestion]:
    """The first questions with the answers of all models; none where nothing was generated."""
    read = [(label, _read_rows(path, count)) for label, path in predictions if path.is_file()]
    if not read or not all("generated" in row for _, rows in read for row in rows):
        return []
    asked = read[0][1]
    return [
        AnsweredQuestion(
            prompt=_shorten(row["prompt"]),
            expected=_shorten(str(row["gold"][0])) if row["gold"] else "",
            answers=tuple(
                Answer(label, _shorten(rows[k]["generated"]), next(iter(rows[k]["metrics"].values()), 0.0))
                for label, rows in read
            ),
        )
        for k, row in enumerate(asked)
    ]


def answer_table(
    questions: Sequence[AnsweredQuestion],  # at least one
) -> Table:
    """A row per question: for Markdown and HTML."""
    headers = ["question", "expected", *(answer.label for answer in questions[0].answers)]
    rows = [
        [question.prompt, question.expected, *(f"{answer.mark} {answer.text}" for answer in question.answers)]
        for question in questions
    ]
    return Table("Answers", headers, rows)


def answer_lines(questions: Sequence[AnsweredQuestion], width: int) -> list[str]:
    """A block of lines per question, for a terminal: answers in the width of a table's columns could not be read."""
    lines: list[str] = []
    for question in questions:
        widest = max(len(label) for label in ("expected", *(answer.label for answer in question.answers)))
        # Of a long question the end is what it asks.
        short = len(question.prompt) <= width
        lines += ["", question.prompt if short else f"…{question.prompt[1 - width :]}"]
        lines += [f"    {'expected':{widest}s}  {question.expected}"] if question.expected else []
        lines += [f"  {answer.mark} {answer.label:{widest}s}  {answer.text}" for answer in question.answers]
    return [_cut(line, width) for line in lines]


def _read_rows(path: Path, count: int) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def _shorten(text: str) -> str:
    return _cut(one_line(text), _LONGEST)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
