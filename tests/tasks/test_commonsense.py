import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tensorpeft.tasks.commonsense import TASKS
from tensorpeft.tasks.records import Record

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "piqa").is_dir(), reason=f"no {DATA / 'piqa'}; set TENSORPEFT_DATA to the folder that holds data/"
)
BY_NAME = {task.name: task for task in TASKS}
LLM_ADAPTERS_FILES = {
    "boolq/train.json": 9427,
    "boolq/test.json": 3270,
    "piqa/test.json": 1838,
    "arc_easy/train.json": 2251,
    "arc_easy/test.json": 2376,
    "arc_challenge/train.json": 1119,
    "arc_challenge/test.json": 1172,
    "openbookqa/train.json": 4957,
    "openbookqa/test.json": 500,
}
# One row of every original, its place among the labels, and what LLM-Adapters would write.
PIQA = {"goal": "Open a jar.", "sol1": "Turn the lid. ", "sol2": "Turn  the table.", "label": 0}
SIQA = {"context": "Kim fell.", "question": "Why?", "answerA": "ice", "answerB": "joy", "answerC": "luck", "label": "3"}
HELLASWAG = {
    "ind": 24,
    "activity_label": "Rowing",
    "ctx_a": "A man sits in a boat.",
    "ctx_b": "he",
    "ctx": "A man sits in a boat. he",
    "endings": ["rows.", "[step] flies.", "sings.", "melts."],
    "label": "1",
}
WINOGRANDE = {
    "qID": "3X-1",
    "sentence": "Al hid from Bo as _ was shy.",
    "option1": "Al",
    "option2": "Bo",
    "answer": "1",
}
BOOLQ = {"question": "is ice cold", "title": "Ice", "answer": False, "passage": "Ice is frozen water."}
ARC = {
    "id": "Mercury_7",
    "question": {"stem": "Which is hot?", "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]},
    "answerKey": "B",
}
ARC_HUB = {
    "id": "7",
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire", "snow", "hail", "sleet"], "label": ["1", "2", "3", "4", "5"]},
    "answerKey": "5",
}
OPENBOOKQA_HUB = {
    "id": "7-980",
    "question_stem": "Fire is",
    "choices": {"text": ["hot", "wet", "old"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}
CONVERTED = {
    "piqa": (
        PIQA,
        "Please choose the correct solution to the question: Open a jar.\n\nSolution1: Turn the lid. \n\n"
        "Solution2: Turn  the table.\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "siqa": (
        SIQA,
        "Please choose the correct answer to the question: Kim fell. Why?\n\n"
        "Answer1: ice Answer2: joy Answer3: luck\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        HELLASWAG,
        "Please choose the correct ending to complete the given sentence: Rowing: A man sits in a boat. he\n\n"
        "Ending1: rows. Ending2: [step] flies. Ending3: sings. Ending4: melts.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    "winogrande": (
        WINOGRANDE,
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Al hid from Bo as _ was shy.\n\nOption1: Al Option2: Bo Answer format: option1/option2",
        "option1",
    ),
    "boolq": (
        BOOLQ,
        "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false",
        "false",
    ),
    "arc_easy": (
        ARC,
        "Please choose the correct answer to the question: Which is hot?\n\nAnswer1: ice Answer2: fire\n\n"
        "Answer format: answer1/answer2",
        "answer2",
    ),
    "arc_challenge": (
        ARC_HUB,
        "Please choose the correct answer to the question: Which is hot?\n\n"
        "Answer1: ice Answer2: fire Answer3: snow Answer4: hail Answer5: sleet\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
    ),
    "openbookqa": (
        OPENBOOKQA_HUB,
        "Please choose the correct answer to the question: Fire is\n\nAnswer1: hot Answer2: wet Answer3: old\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer1",
    ),
}


def row(instruction, answer):
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def parse(name, fields):
    return list(BY_NAME[name].parse(Record(fields, "a file, line 7")))


def read_questions(name, path):
    return [question for record in BY_NAME[name].read(path) for question in BY_NAME[name].parse(record)]


def score(name, text, question):
    judge = BY_NAME[name].score
    assert judge is not None
    return judge(text, question)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(fields) + "\n" for fields in rows), encoding="utf-8")
    return path


def assert_same(question, other):
    """Equal but for the key, which says where a row comes from."""
    assert replace(question, key="") == replace(other, key="")


@needs_data
@pytest.mark.parametrize("name", LLM_ADAPTERS_FILES)
def test_every_row_of_the_published_files(name):
    task, mixture = BY_NAME[name.split("/")[0]], BY_NAME["commonsense"]
    published = json.loads((DATA / name).read_text(encoding="utf-8"))
    questions = read_questions(task.name, DATA / name)
    assert len(questions) == LLM_ADAPTERS_FILES[name] == len({question.key for question in questions})
    for question, fields in zip(questions, published, strict=True):
        assert question.prompt.endswith(f"### Instruction:\n{fields['instruction']}\n\n### Response:\n")
        assert question.response == fields["output"]
        assert question.choices.index(question.response) == question.gold
        assert question.answers == (fields["answer"],)
        assert all(choice.split()[-1] in fields["instruction"] for choice in question.choices)
        assert score(task.name, question.response, question).metrics == {"accuracy": 1.0}
    assert [question for record in mixture.read(DATA / name) for question in mixture.parse(record)] == questions


@needs_data
def test_converted_piqa_is_the_published_piqa_to_the_last_space():
    converted = read_questions("piqa", DATA / "piqa" / "valid.jsonl")
    published = read_questions("piqa", DATA / "piqa" / "test.json")
    for question, other in zip(converted, published, strict=True):
        assert_same(question, other)


@needs_data
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa"])
def test_answers_taken_apart_and_converted_are_the_published_rows(name):
    for fields, question in zip(
        json.loads((DATA / name / "test.json").read_text(encoding="utf-8")),
        read_questions(name, DATA / name / "test.json"),
        strict=True,
    ):
        lead, answers, _ = fields["instruction"].split("\n\n")
        _, *texts = re.split(r" ?Answer\d: ", f" {answers}")
        choices = [{"label": "ABCDE"[index], "text": text} for index, text in enumerate(texts)]
        stem = lead.removeprefix("Please choose the correct answer to the question: ")
        key = "ABCDE"[int(fields["answer"][-1]) - 1]
        converted = parse(name, {"question": {"stem": stem, "choices": choices}, "answerKey": key})
        assert_same(converted[0], question)


@needs_data
def test_hellaswag_as_text():
    questions = read_questions("hellaswag", DATA / "hellaswag" / "hellaswag_val_full.txt.bz2")
    assert len(questions) == 10042
    counts = [sum(question.gold == gold for question in questions) for gold in range(4)]
    assert counts == [2515, 2485, 2584, 2458]  # counted with sort and uniq
    assert all(score("hellaswag", question.response, question).answer for question in questions)
    # The first row of LLM-Adapters' own file.
    assert_same(
        questions[0],
        parse(
            "hellaswag",
            row(
                "Please choose the correct ending to complete the given sentence: Roof shingle removal: A man is "
                "sitting on a roof. he\n\nEnding1: is using wrap to wrap a pair of skis. Ending2: is ripping level "
                "tiles off. Ending3: is holding a rubik's cube. Ending4: starts pulling up roofing on a roof.\n\n"
                "Answer format: ending1/ending2/ending3/ending4",
                "ending4",
            ),
        )[0],
    )


@pytest.mark.parametrize("name", CONVERTED)
def test_an_original_row_becomes_the_row_of_llm_adapters(name):
    fields, instruction, answer = CONVERTED[name]
    (converted,), (expected,) = parse(name, fields), parse(name, row(instruction, answer))
    assert_same(converted, expected)
    assert expected.prompt.endswith(f"### Instruction:\n{instruction}\n\n### Response:\n")
    assert expected.response == f"the correct answer is {answer}"
    assert expected.choices.index(expected.response) == expected.gold
    assert (expected.answers, expected.key) == ((answer,), "a file, line 7")
    assert parse("commonsense", row(instruction, answer)) == [expected]


def test_a_key_is_the_published_one_where_there_is_one():
    keys = {name: parse(name, fields)[0].key for name, (fields, _, _) in CONVERTED.items()}
    assert keys["hellaswag"] == "24"
    assert (keys["winogrande"], keys["arc_easy"], keys["openbookqa"]) == ("3X-1", "Mercury_7", "7-980")
    assert keys["piqa"] == keys["siqa"] == keys["boolq"] == "a file, line 7"


def test_a_question_mark_is_not_doubled_and_labels_may_be_texts_or_numbers():
    assert parse("boolq", {**BOOLQ, "question": "is ice cold?"}) == parse("boolq", BOOLQ)
    for name, fields, labels in [("piqa", PIQA, ("0", 0)), ("siqa", SIQA, (3, "3\n")), ("hellaswag", HELLASWAG, (1,))]:
        for label in labels:
            assert parse(name, {**fields, "label": label}) == parse(name, fields)


def test_the_input_of_a_row_is_in_the_prompt():
    fields = row("Is it cold? Answer format: true/false", "true")
    assert "### Input:\nIt snows.\n\n### Response:\n" in parse("boolq", {**fields, "input": "It snows."})[0].prompt


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("boolq", row("Is it? Answer format: true/false", "maybe"), r"'answer': got 'maybe', expected one of 'true'"),
        ("boolq", row("Is it? Answer format: true/false", "True"), r"'answer': got 'True'"),
        ("boolq", row("Is it?", "true"), r"'instruction': no 'Answer format:' at its end, expected true/false\."),
        ("boolq", row("Which? Answer format: option1/option2", "option1"), r"'Answer format: option1/option2' at its"),
        ("piqa", row("Which? Answer format: solution1", "solution1"), r"expected solution1/solution2"),
        ("hellaswag", row("Which? Answer format: ending1/ending2", "ending1"), r"expected ending1/ending2/ending3/end"),
        ("siqa", row("Which? Answer format: answer2/answer1", "answer1"), r"at its end"),
        ("siqa", row("Which? Answer format: answer1/answer2/answer3", "answer4"), r"'answer': got 'answer4'"),
        ("commonsense", row("Which? Answer format: A/B", "A"), r"expected true/false or solution1/solution2 or"),
        ("commonsense", PIQA, r"'instruction': got nothing"),
        (
            "boolq",
            {**row("Is it? Answer format: true/false", "true"), "output": "the correct answer is false, not true"},
            r"'output': got .*, expected a text whose first label is the answer, 'true'",
        ),
        ("boolq", {**BOOLQ, "answer": "false"}, r"'answer': got 'false', expected true or false\. "),
        ("boolq", {**BOOLQ, "question": " "}, r"'question': got ' '"),
        ("piqa", {**PIQA, "label": 2}, r"'label': got 2, expected one of 0, 1\. "),
        ("piqa", {**PIQA, "label": True}, r"'label': got True"),
        ("piqa", {**PIQA, "sol2": ""}, r"'sol2': got ''"),
        ("siqa", {**SIQA, "label": "0"}, r"'label': got '0', expected one of 1, 2, 3\. "),
        ("siqa", {key: SIQA[key] for key in SIQA if key != "answerC"}, r"'answerC': got nothing"),
        ("hellaswag", {**HELLASWAG, "endings": ["a", "b", "c"]}, r"'endings': got \['a', 'b', 'c'\], expected 4 texts"),
        ("hellaswag", {**HELLASWAG, "endings": ["a", "b", "c", ""]}, r"'endings\[3\]': got ''"),
        ("hellaswag", {**HELLASWAG, "label": "4"}, r"'label': got '4', expected one of 0, 1, 2, 3"),
        ("winogrande", {**WINOGRANDE, "sentence": "Al hid."}, r"'sentence': got 'Al hid\.', expected a text with '_'"),
        ("winogrande", {**WINOGRANDE, "answer": "0"}, r"'answer': got '0'"),
        ("arc_easy", {**ARC, "answerKey": "C"}, r"'answerKey': got 'C', expected one of A, B"),
        ("arc_easy", {**ARC, "question": {"stem": "Which?", "choices": []}}, r"'choices': got \[\]"),
        ("arc_easy", {**ARC_HUB, "choices": {"text": ["a", "b"], "label": ["A"]}}, r"labels A for 2 answers"),
        ("arc_easy", {**ARC_HUB, "choices": {"text": ["a", "b"], "label": ["A", "A"]}}, r"labels A, A for 2 answers"),
        (
            "arc_easy",
            {**ARC_HUB, "choices": {"text": ["a"], "label": ["A"]}},
            r"labels A for 1 answers, expected two to",
        ),
        ("openbookqa", {**OPENBOOKQA_HUB, "choices": {"text": list("abcdef"), "label": list("ABCDEF")}}, r"6 answers"),
    ],
)
def test_a_malformed_row_names_place_and_field(name, fields, message):
    with pytest.raises(ValueError, match=rf"^a file, line 7.*{message}"):
        parse(name, fields)


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("boolq", BOOLQ, "answer"),
        ("piqa", PIQA, "label"),
        ("siqa", SIQA, "label"),
        ("hellaswag", HELLASWAG, "label"),
        ("winogrande", WINOGRANDE, "answer"),
        ("arc_challenge", ARC, "answerKey"),
        ("openbookqa", OPENBOOKQA_HUB, "answerKey"),
    ],
)
@pytest.mark.parametrize("withheld", ["", "-1", -1, None])
def test_a_withheld_label_is_called_so(name, fields, field, withheld):
    message = f"'{field}': got .*it is withheld, as in test sets. Use a split whose labels are published"
    with pytest.raises(ValueError, match=message):
        parse(name, {**fields, field: withheld})
    with pytest.raises(ValueError, match=message):
        parse(name, {key: value for key, value in fields.items() if key != field})


def without_label(fields):
    return {key: value for key, value in fields.items() if key != "label"}


def test_labels_in_a_file_of_their_own(tmp_path):
    path = write_lines(tmp_path / "dev.jsonl", [without_label(SIQA)] * 3)
    labels = tmp_path / "dev-labels.lst"
    labels.write_text("2\n3\n1\n")
    assert [question.gold for question in read_questions("siqa", path)] == [1, 2, 0]
    labels.write_text("2\n3\n")
    with pytest.raises(ValueError, match=r"dev-labels\.lst: 2 lines, expected one for each of the 3 rows"):
        read_questions("siqa", path)
    labels.write_text("2\n3\n4\n")
    with pytest.raises(ValueError, match=r"dev\.jsonl, line 3, field 'label': got '4'"):
        read_questions("siqa", path)
    labels.unlink()
    with pytest.raises(ValueError, match=r"dev\.jsonl, line 1: no field 'label', and no file .*dev-labels\.lst"):
        read_questions("siqa", path)


def test_labels_in_both_files_must_agree(tmp_path):
    path = write_lines(tmp_path / "valid.jsonl", [PIQA, PIQA])
    assert [question.gold for question in read_questions("piqa", path)] == [0, 0]
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(ValueError, match=r"line 2, field 'label': got 0, expected '1' as in .*labels\.lst, line 2"):
        read_questions("piqa", path)


def test_a_list_beside_a_label_file_keeps_its_own_answers(tmp_path):
    path = tmp_path / "valid.json"
    path.write_text(json.dumps([row(*CONVERTED["piqa"][1:])]))
    (tmp_path / "valid-labels.lst").write_text("1\n1\n")
    assert [question.gold for question in read_questions("piqa", path)] == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Rowing: He\n1\na\nb\nc\n", r"5 lines, expected six a row"),
        ("Rowing: He\n1\na\nb\nc\nd\n\n", r"7 lines"),
        ("Rowing He\n1\na\nb\nc\nd\n", r"lines 1 to 6, field 'ctx': got ''"),
        ("Rowing: He\n1\na\nb\nc\nd\nRowing: He\n7\na\nb\nc\nd\n", r"lines 7 to 12, field 'label': got '7'"),
    ],
)
def test_malformed_text_of_hellaswag(tmp_path, text, message):
    (tmp_path / "val.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions("hellaswag", tmp_path / "val.txt")


def test_the_tasks():
    names = "boolq piqa siqa hellaswag winogrande arc_easy arc_challenge openbookqa commonsense"
    assert list(BY_NAME) == names.split()
    for task in TASKS:
        assert (task.generation.max_new_tokens, task.generation.num_beams) == (32, 4)
    (copied,) = pickle.loads(pickle.dumps(BY_NAME["siqa"])).parse(Record(SIQA, "a file, line 7"))
    assert copied == parse("siqa", SIQA)[0]
