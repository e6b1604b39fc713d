import json
import os
import pickle
from pathlib import Path

import pytest

from tensorpeft.evaluation.evaluate import find_mode
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.tasks.cloze import TASKS
from tensorpeft.tasks.records import Record
from tensorpeft.tasks.task import Question

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "piqa").is_dir(), reason=f"no {DATA / 'piqa'}; set TENSORPEFT_DATA to the folder that holds data/"
)
BY_NAME = {task.name: task for task in TASKS}
ARC = {
    "id": "Mercury_7",
    "question": {
        "stem": "Ice melts. Which is hot?",
        "choices": [{"text": "ice ", "label": "A"}, {"text": "Answer: fire", "label": "B"}],
    },
    "answerKey": "B",
}
PIQA = {"goal": "Open a jar.", "sol1": "Turn the lid. ", "sol2": "Turn\n\nthe table.", "label": 0}
OPENBOOKQA = {
    "id": "7-980",
    "question_stem": "Fire is",
    "choices": {"text": ["hot", "wet", "old"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}


def parse(name, fields):
    return list(BY_NAME[name].parse(Record(fields, "a file, line 7")))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        (
            "arc_easy_cloze",
            ARC,
            Question(
                prompt="Question: Ice melts. Which is hot?\nAnswer:",
                response=" Answer: fire",
                answers=("Answer: fire",),
                choices=(" ice", " Answer: fire"),
                gold=1,
                key="Mercury_7",
            ),
        ),
        (
            "piqa_cloze",
            PIQA,
            Question(
                prompt="Question: Open a jar.\nAnswer:",
                response=" Turn the lid.",
                answers=("Turn the lid.",),
                choices=(" Turn the lid.", " Turn\n\nthe table."),
                gold=0,
                key="a file, line 7",
            ),
        ),
        (
            "openbookqa_cloze",
            OPENBOOKQA,
            Question(
                prompt="Fire is",
                response=" hot",
                answers=("hot",),
                choices=(" hot", " wet", " old"),
                gold=0,
                key="7-980",
            ),
        ),
    ],
)
def test_an_original_row(name, fields, expected):
    assert parse(name, fields) == [expected]


@needs_data
@pytest.mark.parametrize(
    "name",
    [f"{task}/{split}" for task in ("arc_easy", "arc_challenge", "openbookqa") for split in ("train", "test")],
)
def test_every_published_row_of_llm_adapters_put_together_again(name):
    path = DATA / f"{name}.json"
    task = BY_NAME[f"{path.parent.name}_cloze"]
    questions = [question for record in task.read(path) for question in task.parse(record)]
    published = json.loads(path.read_text(encoding="utf-8"))
    for question, fields in zip(questions, published, strict=True):
        stem = question.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        numbered = " ".join(f"Answer{number}:{text}" for number, text in enumerate(question.choices, 1))
        together = f"Please choose the correct answer to the question: {stem} {numbered} Answer format:"
        # White space apart: lm-eval's prompts, too, have none at the end of a text.
        assert fields["instruction"].rpartition("/answer")[0].split()[:-1] == together.split()
        assert question.gold is not None
        assert question.response == question.choices[question.gold]
        assert fields["answer"] == f"answer{question.gold + 1}"


@needs_data
def test_both_forms_of_piqa_are_the_same_questions():
    task = BY_NAME["piqa_cloze"]
    forms = []
    for name in ("valid.jsonl", "test.json"):
        questions = [question for record in task.read(DATA / "piqa" / name) for question in task.parse(record)]
        forms.append([(question.prompt, question.choices, question.gold) for question in questions])
    assert forms[0] == forms[1]
    assert len(forms[0]) == 1838


def test_a_row_without_texts_is_named():
    instruction = (
        "Please choose the correct answer to the question: Which?\n\nAnswer1: ice Answer2: \n\n"
        "Answer format: answer1/answer2"
    )
    fields = {"instruction": instruction, "input": "", "output": "the correct answer is answer1", "answer": "answer1"}
    with pytest.raises(
        ValueError, match=r"a file, line 7, field 'instruction': .* the texts of Answer1, Answer2, none"
    ):
        parse("arc_easy_cloze", fields)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_answers_are_compared_by_likelihood_unless_asked_otherwise(task):
    assert find_mode(task, EvaluationOptions()) == "likelihood"
    assert find_mode(task, EvaluationOptions(mode="loss")) == "loss"
    with pytest.raises(ValueError, match="Use mode likelihood"):
        find_mode(task, EvaluationOptions(mode="generate"))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_tasks_can_be_sent_to_workers(task):
    sent = pickle.loads(pickle.dumps(task))
    fields = OPENBOOKQA if "openbookqa" in task.name else PIQA if "piqa" in task.name else ARC
    row = Record(fields, "a file, line 7")
    assert list(sent.parse(row)) == list(task.parse(row))
