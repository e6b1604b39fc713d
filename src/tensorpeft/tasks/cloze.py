"""Commonsense questions in the cloze form: the answer is its text, not its number.

A small model cannot say which of four answers it means by a number, but finds the right text likelier than the others.
The wording is lm-eval's, for the tasks of the same names without "_cloze". Rows are those of the numbered tasks
(`commonsense`): of LLM-Adapters, whose numbered texts are taken apart again, and of the original data sets.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tensorpeft.tasks import commonsense
from tensorpeft.tasks.records import Record
from tensorpeft.tasks.task import Question, QuestionTask

_NUMBERED = re.compile(
    r"Please choose the correct \w+ to the question: (?P<stem>.+)\n\n(?P<texts>\w+1: .+)\n\nAnswer format: ", re.DOTALL
)
_ASKED = "Question: {stem}\nAnswer:"
_NUMBERED_TASKS = {task.name: task for task in commonsense.TASKS}


def _parse(record: Record, name: str, prompt: str) -> Sequence[Question]:
    return [_as_cloze(question, prompt, record) for question in _NUMBERED_TASKS[name].parse(record)]


def _as_cloze(question: Question, prompt: str, record: Record) -> Question:
    """The same question, its answers' texts in the place of their numbers."""
    found = _NUMBERED.search(question.prompt)
    labels = [choice.rpartition(" ")[2].capitalize() for choice in question.choices]
    split = found and re.fullmatch(r"\s+".join(rf"{label}: (.*?)" for label in labels), found["texts"], re.DOTALL)
    texts = [text.strip() for text in split.groups()] if split else []
    if not found or not all(texts):
        raise record.error("instruction", f"a question, and the texts of {', '.join(labels)}, none of them blank")
    choices = tuple(f" {text}" for text in texts)
    return replace(
        question,
        prompt=prompt.format(stem=found["stem"].strip()),
        response=choices[question.gold or 0],
        answers=(texts[question.gold or 0],),
        choices=choices,
    )


def _task(name: str, description: str, prompt: str = _ASKED) -> QuestionTask:
    # partial, not a closure: a task must be picklable for data workers.
    parse = partial(_parse, name=name, prompt=prompt)
    return QuestionTask(f"{name}_cloze", description, _NUMBERED_TASKS[name].read, parse, mode="likelihood")


TASKS: tuple[QuestionTask, ...] = (
    _task("piqa", "PIQA: which of two ways reaches a goal? The likelier text is the answer."),
    _task("arc_easy", "ARC-Easy: school science questions; the likeliest text is the answer."),
    _task("arc_challenge", "ARC-Challenge: the harder school science questions; the likeliest text is the answer."),
    _task("openbookqa", "OpenBookQA: elementary science; the likeliest end of the sentence is the answer.", "{stem}"),
)
