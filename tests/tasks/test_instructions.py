import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tensorpeft.tasks.instructions import TASKS
from tensorpeft.tasks.task import Question

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data" / "instructions"
(TASK,) = TASKS
HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
HEAD_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
published = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no instruction data in {DATA}; set TENSORPEFT_DATA to the folder that holds data/"
)


def examples(path):
    return [question for record in TASK.read(path) for question in TASK.parse(record)]


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def openai(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def sharegpt(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


@published
def test_the_published_alpaca_rows():
    rows = json.loads((DATA / "instruction-data.json").read_text(encoding="utf-8"))
    questions = examples(DATA / "instruction-data.json")
    assert len(questions) == 1100
    assert [question.response for question in questions] == [row["output"] for row in rows]
    assert Counter(question.prompt.startswith(HEAD_WITH_INPUT) for question in questions) == {False: 775, True: 325}
    assert questions[0].prompt == (
        f"{HEAD_WITH_INPUT}Evaluate the following phrase by transforming it into the spelling given.\n\n"
        "### Input:\nfreind --> friend\n\n### Response:\n"
    )
    assert questions[2].prompt == f"{HEAD}Convert 45 kilometers to meters.\n\n### Response:\n"
    assert questions[2].response == "45 kilometers is 45000 meters."


@published
def test_the_published_prompted_rows_are_used_as_they_stand():
    path = DATA / "dolly_hhrlhf_train_small.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    questions = examples(path)
    assert len(questions) == 1000
    assert [(question.prompt, question.response) for question in questions] == [
        (row["prompt"], row["response"]) for row in rows
    ]


@published
def test_our_template_is_the_one_that_others_published(tmp_path):
    # Another project templated these prompts; each is taken apart here and put together by the form under test.
    published = [question.prompt for question in examples(DATA / "dolly_hhrlhf_train_small.jsonl")]
    instructions = [prompt.removeprefix(HEAD).removesuffix("\n\n### Response:\n") for prompt in published]
    rows = [{"instruction": instruction, "output": "x"} for instruction in instructions]
    assert [question.prompt for question in examples(write(tmp_path, *rows))] == published


@published
def test_the_published_seed_tasks():
    questions = examples(DATA / "seed_tasks.jsonl")
    assert len(questions) == 175
    assert [question.key for question in questions] == [f"seed_task_{number}" for number in range(175)]
    assert sum(question.prompt.startswith(HEAD) for question in questions) == 50
    assert questions[1].prompt == (
        f"{HEAD_WITH_INPUT}What is the relation between the given pairs?\n\n"
        "### Input:\nNight : Day :: Right : Left\n\n### Response:\n"
    )
    assert questions[1].response == "The relation between the given pairs is that they are opposites."


def test_a_seed_task_is_a_question_per_instance(tmp_path):
    instances = [{"input": "2", "output": "4"}, {"input": "", "output": "none"}]
    path = write(tmp_path, {"id": "double", "instruction": "Double it.", "instances": instances})
    assert examples(path) == [
        Question(f"{HEAD_WITH_INPUT}Double it.\n\n### Input:\n2\n\n### Response:\n", "4", key="double, instance 0"),
        Question(f"{HEAD}Double it.\n\n### Response:\n", "none", key="double, instance 1"),
    ]


@pytest.mark.parametrize("form", [openai, sharegpt])
def test_a_conversation_teaches_its_last_message(tmp_path, form):
    user, assistant = ("user", "assistant") if form is openai else ("human", "gpt")
    path = write(
        tmp_path,
        form((user, "Hi {there}."), (assistant, "Hello.")),
        form(("system", "Be brief."), (user, "Hi."), (assistant, "Hello.")),
        form(("system", ""), (user, "Hi."), (assistant, "Hello.")),
        form(("system", "Be brief."), (user, "Hi."), (assistant, "Hello."), (user, "1 + 1?"), (assistant, "2")),
    )
    assert [(question.prompt, question.response) for question in examples(path)] == [
        (f"{HEAD}Hi {{there}}.\n\n### Response:\n", "Hello."),
        (f"Be brief.\n\n{HEAD}Hi.\n\n### Response:\n", "Hello."),
        (f"{HEAD}Hi.\n\n### Response:\n", "Hello."),
        (
            f"Be brief.\n\n{HEAD}Hi.\n\n### Response:\nHello.\n\n### Instruction:\n1 + 1?\n\n### Response:\n",
            "2",
        ),
    ]


def test_messages_count_where_the_prompt_is_repeated_as_a_field(tmp_path):
    (question,) = examples(write(tmp_path, {"prompt": "Hi.", **openai(("user", "Hi."), ("assistant", "Hello."))}))
    assert (question.prompt, question.response) == (f"{HEAD}Hi.\n\n### Response:\n", "Hello.")


def test_the_key_is_the_identifier_or_the_place(tmp_path):
    row = {"instruction": "Go.", "input": "", "output": "Gone."}
    path = write(tmp_path, {**row, "id": 0}, {**row, "id": None}, row)
    assert [question.key for question in examples(path)] == ["0", f"{path}, line 2", f"{path}, line 3"]


GOOD = {"instruction": "Go.", "input": "", "output": "Gone."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Go."}, "fields text; expected one of instances, instruction, messages, conversations, prompt"),
        ({"instruction": "Go.", "input": ""}, "field 'output': got nothing"),
        ({**GOOD, "output": " \n"}, "field 'output': got .* expected a text that is not empty"),
        ({**GOOD, "instruction": ""}, "field 'instruction': got '', expected a text that is not empty"),
        ({**GOOD, "input": None}, "field 'input': got None, expected a text"),
        ({**GOOD, "output": 4}, "field 'output': got 4, expected a text"),
        ({"instruction": "Go.", "instances": []}, r"field 'instances': got \[\], expected a list"),
        ({"instruction": "Go.", "instances": ["Gone."]}, r"field 'instances\[0\]': got 'Gone.', expected an object"),
        (
            {"instruction": "Go.", "instances": [GOOD, {"input": "", "output": ""}]},
            r"in 'instances\[1\]', field 'output'",
        ),
        ({"instances": [GOOD]}, "field 'instruction': got nothing"),
        ({"prompt": "Go."}, "field 'response': got nothing"),
        ({"prompt": "", "response": "Gone."}, "field 'prompt': got ''"),
        (openai(), "field 'messages'.*expected a list that is not empty"),
        (openai(("user", "Go.")), "field 'messages'.*last message is the assistant's"),
        (openai(("user", "Go."), ("user", "On.")), r"in 'messages\[1\]', field 'role': got 'user'.*assistant at this"),
        (openai(("assistant", "Go.")), r"in 'messages\[0\]', field 'role'.*system or user at this point"),
        (openai(("user", "Go."), ("system", "x")), r"in 'messages\[1\]', field 'role': got 'system'"),
        (openai(("user", "Go."), ("tool", "x")), r"in 'messages\[1\]', field 'role': got 'tool', expected one of"),
        (openai(("user", "Go."), ("assistant", "")), r"in 'messages\[1\]', field 'content': got ''"),
        (openai(("user", "Go."), ("assistant", None)), r"in 'messages\[1\]', field 'content': got None"),
        ({"messages": [{"role": "user"}]}, r"in 'messages\[0\]', field 'content': got nothing"),
        ({"messages": "Go."}, "field 'messages': got 'Go.', expected a list"),
        (sharegpt(("human", "Go."), ("human", "On.")), r"in 'conversations\[1\]', field 'from': got 'human'"),
        (sharegpt(("human", " "), ("gpt", "On.")), r"in 'conversations\[0\]', field 'value': got ' '"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2[:,] ?{message}"):
        examples(write(tmp_path, GOOD, row, GOOD))


def test_only_json_is_read(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output\n")
    with pytest.raises(ValueError, match=r"rows\.csv: expected a file that ends in \.json or \.jsonl"):
        examples(tmp_path / "rows.csv")
