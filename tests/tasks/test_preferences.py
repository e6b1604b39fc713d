import json
import os
from pathlib import Path

import pytest

from tensorpeft.tasks.preferences import TASKS
from tensorpeft.tasks.task import Preference

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data" / "dpo"
(TASK,) = TASKS
HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
END = "\n\n### Response:\n"
published = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no preference pairs in {DATA}; set TENSORPEFT_DATA to the folder that holds data/"
)


def pairs(path):
    return [pair for record in TASK.read(path) for pair in TASK.parse(record)]


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@published
def test_the_published_openai_rows():
    lines = (DATA / "orca_dpo_pairs_validation.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    rows = list(map(json.loads, lines))
    found = pairs(DATA / "orca_dpo_pairs_validation.jsonl")
    assert len(found) == 284
    for row, pair in zip(rows, found, strict=True):
        system, question = (message["content"] for message in row["input"]["messages"])
        assert pair.prompt == f"{system}\n\n{HEAD}{question}{END}"
        assert pair.chosen == row["preferred_output"][0]["content"]
        assert pair.rejected == row["non_preferred_output"][0]["content"]
    assert found[0].chosen.startswith("Step 1: Identify the names and phrases in the given text.")
    assert found[0].rejected.startswith("Sure, I'd be happy to help!")


@published
def test_the_published_alpaca_rows_with_the_six_that_a_rewrite_left_unchanged():
    rows = json.loads((DATA / "instruction-data-with-preference.json").read_text(encoding="utf-8"))
    found = pairs(DATA / "instruction-data-with-preference.json")
    assert len(found) == 1100
    assert [(pair.chosen, pair.rejected) for pair in found] == [(row["chosen"], row["rejected"]) for row in rows]
    assert sum(pair.chosen == pair.rejected for pair in found) == 6
    assert found[2].prompt == f"{HEAD}Convert 45 kilometers to meters.{END}"
    assert "### Input:\nfreind --> friend\n\n### Response:\n" in found[0].prompt


@published
def test_the_published_sharegpt_rows():
    rows = json.loads((DATA / "dpo_en_demo.json").read_text(encoding="utf-8"))
    found = pairs(DATA / "dpo_en_demo.json")
    assert len(found) == 300
    for row, pair in zip(rows, found, strict=True):
        assert (pair.chosen, pair.rejected) == (row["chosen"]["value"], row["rejected"]["value"])
        rest = pair.prompt
        for message in row["conversations"]:
            before, text, rest = rest.partition(message["value"])
            assert text, "every message is in the prompt, in order"
            assert before.endswith(
                {"human": "### Instruction:\n", "gpt": "### Response:\n", "system": ""}[message["from"]]
            )
        assert rest == END


MESSAGES = [user("Hi."), assistant("Hello."), user("1 + 1?")]
DIALOGUE = f"{HEAD}Hi.{END}Hello.\n\n### Instruction:\n1 + 1?{END}"
ALONE = f"{HEAD}1 + 1?{END}"
FORMS = {
    "openai": (
        {
            "input": {"messages": MESSAGES},
            "preferred_output": [assistant("2")],
            "non_preferred_output": [assistant("3")],
        },
        DIALOGUE,
    ),
    "alpaca": ({"instruction": "1 + 1?", "input": "", "chosen": "2", "rejected": "3"}, ALONE),
    "alpaca with output": (
        {"instruction": "1 + 1?", "input": "", "output": "2", "chosen": "2", "rejected": "3"},
        ALONE,
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi."},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "1 + 1?"},
            ],
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "3"},
        },
        f"Be brief.\n\n{DIALOGUE}",
    ),
    "orca": ({"system": "Be brief.", "question": "1 + 1?", "chosen": "2", "rejected": "3"}, f"Be brief.\n\n{ALONE}"),
    "orca without a system text": ({"system": "", "question": "1 + 1?", "chosen": "2", "rejected": "3"}, ALONE),
    "argilla": (
        {
            "system": "Be brief.",
            "input": "1 + 1?",
            "chosen": "2",
            "rejected": "3",
            "status": "swapped",
            "chosen_score": 9.0,
            "in_gsm8k_train": False,
        },
        f"Be brief.\n\n{ALONE}",
    ),
    "trl texts": ({"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}, "1 + 1 ="),
    "trl messages": ({"prompt": MESSAGES, "chosen": [assistant("2")], "rejected": [assistant("3")]}, DIALOGUE),
    "trl without a prompt": (
        {"chosen": [*MESSAGES, assistant("2")], "rejected": [*MESSAGES, assistant("3")]},
        DIALOGUE,
    ),
    "trl with the prompt as a text too": (
        {"prompt": "1 + 1?", "chosen": [*MESSAGES, assistant("2")], "rejected": [*MESSAGES, assistant("3")]},
        DIALOGUE,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form(tmp_path, form):
    row, prompt = FORMS[form]
    path = write(tmp_path, row, {**row, "id": "pair-7"})
    assert pairs(path) == [
        Preference(prompt, "2", "3", key=f"{path}, line 1"),
        Preference(prompt, "2", "3", key="pair-7"),
    ]


def test_the_texts_of_trl_keep_their_spaces(tmp_path):
    (pair,) = pairs(write(tmp_path, {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " blue.", " green.")


def changed(form, **fields):
    return {**FORMS[form][0], **fields}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Go."}, "fields text; expected those of one form: input, preferred_output; or conversations"),
        (changed("argilla", status="tie"), r"field 'status': got 'tie', expected a pair.*drop: {status: \[tie\]}"),
        (changed("trl texts", chosen="3"), "field 'rejected': got '3', expected a response other than the preferred"),
        (changed("trl texts", chosen="3\n"), "field 'rejected': got '3', expected a response other than the preferred"),
        (changed("alpaca", chosen="3"), "field 'rejected': got '3', expected a response other"),
        (changed("alpaca with output", chosen="3"), "field 'rejected': got '3', expected a response other"),
        (
            changed("openai", preferred_output=[assistant("3")]),
            "field 'non_preferred_output'.*expected a response other",
        ),
        (changed("orca", chosen=""), "field 'chosen': got '', expected a text that is not empty"),
        (changed("orca", rejected=None), "field 'rejected': got None, expected a text"),
        (changed("orca", question=" "), "field 'question': got ' ', expected a text that is not empty"),
        (changed("orca", system=None), "field 'system': got None, expected a text"),
        (changed("argilla", input={"a": 1}), "field 'input': got {'a': 1}, expected a text"),
        (changed("alpaca", instruction=""), "field 'instruction': got ''"),
        ({"instruction": "Go.", "input": "", "chosen": "2"}, "field 'rejected': got nothing"),
        ({"prompt": "Go.", "rejected": "3"}, "field 'chosen': got nothing"),
        ({"chosen": "Human: Hi. 2", "rejected": "Human: Hi. 3"}, "field 'prompt': got nothing"),
        (changed("trl texts", rejected=[assistant("3")]), "field 'rejected'.*expected a text"),
        (changed("trl texts", prompt=MESSAGES), "field 'prompt'.*expected a text"),
        (changed("trl messages", rejected="3"), "field 'rejected': got '3', expected a list"),
        (changed("trl messages", prompt="1 + 1?"), r"in 'chosen\[0\]', field 'role': got 'assistant'"),
        (changed("trl messages", chosen=[user("2")]), r"in 'chosen\[0\]', field 'role': got 'user'.*of assistant at"),
        (changed("trl messages", chosen=[assistant("2"), user("x")]), "field 'chosen'.*the last is the assistant's"),
        (
            changed("trl without a prompt", rejected=[user("Bye."), assistant("3")]),
            "field 'rejected'.*expected the messages of 'chosen' up to the last one",
        ),
        (changed("trl with the prompt as a text too", prompt="2 + 2?"), "field 'prompt': got '2 .* user's message in"),
        (changed("openai", input={"messages": []}), r"in 'input', field 'messages'.*a list that is not empty"),
        (changed("openai", input="Hi."), "field 'input': got 'Hi.', expected an object"),
        (changed("openai", preferred_output=[]), r"field 'preferred_output': got \[\]"),
        ({key: FORMS["openai"][0][key] for key in ("input", "preferred_output")}, "field 'non_preferred_output': got"),
        (changed("sharegpt", chosen={"from": "human", "value": "2"}), "in 'chosen', field 'from': got 'human'"),
        (changed("sharegpt", rejected={"from": "gpt", "value": ""}), "in 'rejected', field 'value': got ''"),
        (changed("sharegpt", rejected="3"), "field 'rejected': got '3', expected a list"),
        (changed("sharegpt", conversations=[]), r"field 'conversations': got \[\]"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(tmp_path, row, message):
    good = FORMS["orca"][0]
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2[:,] ?{message}"):
        pairs(write(tmp_path, good, row, good))
