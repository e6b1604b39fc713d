import gzip
import json
import os
import random
from pathlib import Path

import pytest

pytest.importorskip("scipy")
from tensorpeft.tasks.question_answering import TASKS
from tensorpeft.tasks.records import Record
from tensorpeft.tasks.span_scores import drop_scores, squad_scores
from tensorpeft.tasks.task import Question

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data"
TASK = {task.name: task for task in TASKS}
PUBLISHED = {  # path: (task, questions)
    "superglue_copa/train.jsonl": ("copa", 400),
    "superglue_copa/val.jsonl": ("copa", 100),
    "squad_xquad_en/xquad.en.json": ("squad", 1190),
    "drop/drop_v0_dev.jsonl.gz": ("drop", 9536),
}


def published(path):
    if not (DATA / path).is_file():
        pytest.skip(f"no {path} in {DATA}; set TENSORPEFT_DATA to the folder that holds data/")
    task = TASK[PUBLISHED[path][0]]
    return [question for row in task.read(DATA / path) for question in task.parse(row)]


def parse(name, fields):
    return list(TASK[name].parse(Record(fields, "row 1")))


def read(name, path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return [question for row in TASK[name].read(path) for question in TASK[name].parse(row)]


def judge(name, text, question):
    judged = TASK[name].score
    assert judged
    return judged(text, question)


def score(name, text, question):
    return dict(judge(name, text, question).metrics)


@pytest.mark.parametrize("path", PUBLISHED)
def test_every_published_row_is_read_and_its_response_is_right(path):
    name, num_questions = PUBLISHED[path]
    questions = published(path)
    assert len(questions) == num_questions
    assert len({question.key for question in questions}) == num_questions
    for question in questions:
        assert question.prompt == question.prompt.strip()
        assert question.response == " " + question.response.strip()
        assert set(score(name, question.response, question).values()) == {1.0}, question
        if name == "copa":
            assert question.gold is not None
            assert question.choices[question.gold] == question.response
            assert score(name, question.choices[1 - question.gold], question) == {"accuracy": 0.0}
        else:
            assert question.prompt.startswith("Passage: ")
            assert question.prompt.endswith("\nAnswer:")


def test_first_rows_of_the_published_files():
    copa = published("superglue_copa/train.jsonl")[0]
    assert copa.prompt == "My body cast a shadow over the grass because"
    assert copa.choices == (" the sun was rising.", " the grass was cut.")
    assert (copa.gold, copa.key) == (0, "0")
    squad = published("squad_xquad_en/xquad.en.json")[0]
    assert squad.prompt.startswith("Passage: The Panthers defense gave up just 308 points, ")
    assert (squad.response, squad.answers, squad.key) == (" 308", ("308",), "56beb4343aeaaa14008c925b")
    drop = published("drop/drop_v0_dev.jsonl.gz")
    assert drop[1].response == " Pakistanis and Filipinos"
    assert drop[1].answers == ("Pakistanis and Filipinos", "Pakistani and Filipino")
    assert drop[1].key.endswith("drop_v0_dev.jsonl.gz, line 2")


def test_how_answers_are_generated():
    assert {(task.generation.max_new_tokens, task.generation.stop) for task in TASKS} == {(32, ("\n",))}


COPA = {"premise": "I lost. ", "choice1": " I'm slow.", "choice2": "He was fast.", "question": "cause", "label": 1}


def test_copa_prompt_and_choices():
    (question,) = parse("copa", COPA | {"idx": 7})
    assert question == Question(
        "I lost because", " he was fast.", ("he was fast.",), (" I'm slow.", " he was fast."), gold=1, key="7"
    )
    assert parse("copa", COPA | {"question": "effect"})[0].prompt == "I lost so"
    assert parse("copa", COPA)[0].key == "row 1"


@pytest.mark.parametrize(
    ("text", "answer", "accuracy"),
    [
        (" he was fast.", "he was fast.", 1),
        ("He was fast, and I cried", "he was fast.", 1),
        (" I'm slow.", "I'm slow.", 0),
        (" he was faster", None, 0),  # begins with the letters, not with the words
        (" well, he was fast.", None, 0),
        ("", None, 0),
    ],
)
def test_copa_finds_the_alternative_that_a_text_begins_with(text, answer, accuracy):
    scored = judge("copa", text, parse("copa", COPA)[0])
    assert (scored.answer, dict(scored.metrics)) == (answer, {"accuracy": accuracy})


def test_copa_takes_the_longer_of_two_alternatives():
    (question,) = parse("copa", COPA | {"choice1": "He was fast and young."})
    assert judge("copa", " he was fast and young", question).answer == "he was fast and young."


TEXT = "Anna met the U.S. envoy.\n@highlight\nAnna lives in Bern\n@highlight\n\nUS envoy is here"
RECORD = {
    "source": "Daily mail",
    "passage": {
        "text": TEXT,
        "entities": [{"start": start, "end": start + len(name) - 1} for name, start in
                     ((name, TEXT.index(name)) for name in ("Anna", "U.S.", "Anna", "Bern", "US"))],
    },
    "qas": [
        {"query": "@placeholder sent an envoy", "answers": [{"start": 77, "end": 78, "text": "US"}], "idx": 4},
        {"query": "She is from @placeholder", "answers": [{"start": 0, "end": 3, "text": "Bern"}], "idx": 5},
    ],
    "idx": 2,
}  # fmt: skip
FLAT_RECORD = {
    "passage": TEXT,
    "query": "@placeholder sent an envoy",
    "entities": ["Bern", "Anna", "US", "U.S."],
    "answers": ["U.S.", "US"],
    "idx": {"passage": 2, "query": 4},
}


def test_record_as_published_has_several_questions_to_a_row(tmp_path):
    first, second = read("record", tmp_path / "val.jsonl", json.dumps(RECORD) + "\n")
    assert first.prompt == (
        "Passage: Anna met the U.S. envoy.\n- Anna lives in Bern\n- US envoy is here\n"
        "Question: Fill in the blank: _____ sent an envoy\nAnswer:"
    )
    assert first.choices == second.choices == (" Anna", " U.S.", " Bern", " US")
    assert (first.gold, first.response, first.answers, first.key) == (1, " U.S.", ("US",), "4")
    assert (first.also_gold, second.also_gold) == ((3,), ())
    assert (second.gold, second.response, second.answers, second.key) == (2, " Bern", ("Bern",), "5")
    assert score("record", " US", first) == {"F1": 1, "exact match": 1}


def test_record_of_the_hub():
    (question,) = parse("record", FLAT_RECORD)
    assert question.choices == (" Bern", " Anna", " US", " U.S.")
    assert (question.gold, question.response, question.answers) == (2, " US", ("U.S.", "US"))
    assert (question.key, question.also_gold) == ("4", (3,))
    assert question.prompt == parse("record", RECORD)[0].prompt


def squad_file(**changes):
    qa = {"id": "a1", "question": " Who won? ", "answers": [{"answer_start": 0, "text": "Bern"}]} | changes
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "Bern won.", "qas": [qa, qa]}]}]}


def test_squad_as_published_and_of_the_hub_are_the_same_question(tmp_path):
    expected = Question("Passage: Bern won.\nQuestion: Who won?\nAnswer:", " Bern", ("Bern",), key="a1")
    assert read("squad", tmp_path / "dev.json", squad_file()) == [expected, expected]
    flat = {"id": "a1", "title": "T", "context": "Bern won.", "question": "Who won?"}
    flat |= {"answers": {"text": ["Bern", "Bern"], "answer_start": [0, 0]}}
    assert read("squad", tmp_path / "dev.jsonl", f"{json.dumps(flat)}\n") == [expected]


def annotated(number="", spans=(), day="", month="", year=""):
    return {"number": number, "spans": list(spans), "date": {"day": day, "month": month, "year": year}}


def drop_file(**changes):
    qa = {"question": "Which?", "answer": annotated("3"), "query_id": "q1"} | changes
    return {"nfl_1": {"passage": "A passage.", "qa_pairs": [qa]}, "nfl_2": {"passage": "Another.", "qa_pairs": [qa]}}


def test_drop_as_published(tmp_path):
    several = annotated(spans=["Tony  Romo", "Shaun Hill"])
    (question, other) = read("drop", tmp_path / "dev.json", drop_file(answer=several, validated_answers=[
        annotated("3", spans=["three"]),  # the number goes before the spans
        annotated(month="May", year="1990"),
        annotated(),  # an annotator without an answer does not count
        annotated("3"),
    ]))  # fmt: skip
    assert question.prompt == "Passage: A passage.\nQuestion: Which?\nAnswer:"
    assert other.prompt == "Passage: Another.\nQuestion: Which?\nAnswer:"
    assert question.response == " Tony Romo and Shaun Hill"
    assert question.answers == ("Tony Romo\nShaun Hill", "3", "May 1990")
    assert question.key == "q1"
    assert score("drop", " Shaun Hill and Tony Romo", question) == {"F1": 1, "exact match": 1}
    assert score("drop", " May 1990", question) == {"F1": 1, "exact match": 1}


def test_drop_takes_the_first_answer_there_is(tmp_path):
    (question, _) = read(
        "drop", tmp_path / "dev.json", drop_file(answer=annotated(), validated_answers=[annotated(spans=["Romo"])])
    )
    assert (question.response, question.answers) == (" Romo", ("Romo",))


def test_drop_of_the_hub_and_of_simple_evals(tmp_path):
    hub = {"passage": "A passage.", "question": "Which?", "query_id": "q1"}
    hub |= {"answers_spans": {"spans": ["Romo", "Hill"], "types": ["span", "span"]}}
    (question,) = parse("drop", hub)
    assert (question.response, question.answers, question.key) == (" Romo", ("Romo", "Hill"), "q1")
    row = {"context": question.prompt, "completion": "  Hill and Romo", "ref_text": " Hill and Romo|Romo"}
    with gzip.open(tmp_path / "dev.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    (same,) = [q for record in TASK["drop"].read(tmp_path / "dev.jsonl.gz") for q in TASK["drop"].parse(record)]
    assert (same.prompt, same.response) == (question.prompt, " Hill and Romo")
    assert same.answers == ("Hill and Romo", "Romo")
    assert score("drop", " Romo and Hill", same) == {"F1": 1, "exact match": 0}  # one span: the order matters


# Computed by hand: F1 = 2 common / (words found + words right).
@pytest.mark.parametrize(
    ("text", "answers", "f1", "exact"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        (" the denver\nbroncos.", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos"], 2 / 3, 0),
        ("Panthers", ["Denver Broncos"], 0, 0),
        ("x x y", ["x y y"], 2 / 3, 0),  # common: x once, y once
        ("gold anniversary year", ["gold", "gold anniversary"], 4 / 5, 0),  # the better of 1/2 and 4/5
        ("U.S.", ["China", "US"], 1, 1),
        ("well-known", ["wellknown"], 1, 1),
        ("well-known", ["well known"], 0, 0),
        ("", ["308"], 0, 0),
        ("the", ["an"], 0, 1),  # both are empty: equal, and nothing common
        ("another theory", ["theory"], 2 / 3, 0),  # articles are whole words
        ("308 points in all", ["308"], 2 / 5, 0),
        ("Levi’s", ["Levi's"], 0, 0),  # only ASCII punctuation goes
    ],
)
def test_squad_scores_by_hand(text, answers, f1, exact):
    assert squad_scores(text, answers) == pytest.approx({"F1": f1, "exact match": exact})


# Computed by hand: the best pairing's F1, over the larger number of spans, to two digits.
@pytest.mark.parametrize(
    ("text", "answers", "f1", "exact"),
    [
        (" 4", [["4"]], 1, 1),
        ("4.0", [["4"]], 1, 1),
        ("1,000", [["1000"]], 1, 1),
        ("$2.50", [["2.50"]], 0, 0),  # no number because of the sign, then 250 without its punctuation
        ("-5", [["5"]], 1, 1),  # split at the hyphen
        ("5 yards", [["4 yards"]], 0, 0),  # numbers must match
        ("yards", [["4 yards"]], 0, 0),
        ("4 yards", [["yards"]], 0.67, 0),
        ("4", [["4 yards"]], 0.67, 0),
        ("44-yard", [["the 44 Yard"]], 1, 1),
        ("3 March 1990", [["March 1990"]], 0.8, 0),
        ("x x y", [["x y"]], 1, 0),  # sets of words, but the texts differ
        ("", [["4"]], 0, 0),
        ("Tony Romo and Shaun Hill", [["Shaun Hill", "Tony Romo"]], 1, 1),
        ("Tony Romo", [["Shaun Hill", "Tony Romo"]], 0.5, 0),
        ("Tony Romo and Shaun Hill and Bob", [["Shaun Hill", "Tony Romo"]], 0.67, 0),
        ("Romo and Hill", [["Shaun Hill", "Tony Romo"]], 0.67, 0),
        ("Romo and Hill and Hill", [["Hill", "Romo"]], 0.67, 0),
        ("red and red blue", [["red blue", "red green"]], 0.83, 0),  # (1 + 2/3) / 2; in order it would be 0.58
        ("Xara and Sharp", [["Sharp and Xara"]], 1, 0),  # one span is not split
        ("Peace and Land and Bread", [["Peace and Land", "Bread"]], 1, 1),
        ("4 yards", [["9"], ["4", "yards"]], 0.33, 0),  # the better of 0 and (2/3 + 0) / 2
    ],
)
def test_drop_scores_by_hand(text, answers, f1, exact):
    assert drop_scores(text, answers) == {"F1": f1, "exact match": exact}


def random_texts(path, seed):
    """Endless short texts of words, and broken words, of the real answers."""
    draw = random.Random(seed)
    words = [word for question in published(path)[:3000] for answer in question.answers for word in answer.split(" ")]
    words = [word for word in words if word != "and"] + ["the", "A", "an", "3", "3.0", "1,000", "$5", "-", "nan", ""]
    few = draw.sample(words, 25)  # drawn often, so that texts have words in common
    while True:
        yield " ".join(draw.choice(few if draw.random() < 0.8 else words) for _ in range(draw.randint(1, 4)))


def test_squad_scores_agree_with_another_implementation():
    oracle = pytest.importorskip("lm_eval.tasks.qasper.metrics")
    texts = random_texts("squad_xquad_en/xquad.en.json", seed=0)
    seen = set()
    for text, answer in zip((next(texts) for _ in range(3000)), texts, strict=False):
        scores = squad_scores(text, [answer])
        assert scores["F1"] == pytest.approx(oracle.f1_abstractive([text], [answer]))
        assert scores["exact match"] == (oracle.normalize_answer(text) == oracle.normalize_answer(answer))
        seen.add((scores["F1"] not in (0, 1), scores["exact match"]))
    assert len(seen) == 3  # partly right, exact, and neither


def test_drop_scores_agree_with_another_implementation():
    oracle = pytest.importorskip("lm_eval.tasks.drop.utils")
    texts, draw = random_texts("drop/drop_v0_dev.jsonl.gz", seed=0), random.Random(0)
    seen = set()
    for _ in range(3000):
        answer = [next(texts) for _ in range(draw.choice((1, 1, 2, 3)))]
        found = [next(texts) for _ in range(draw.randint(1, 3))] if len(answer) > 1 else [next(texts)]
        found = draw.sample(answer, len(answer)) if draw.random() < 0.1 else found
        scores = drop_scores(" and ".join(found), [answer])
        assert (scores["exact match"], scores["F1"]) == oracle.get_metrics(found, answer), (found, answer)
        seen.add((len(answer) > 1, scores["F1"] not in (0, 1), scores["exact match"]))
    assert len(seen) == 6  # partly right, exact, and neither; of one span and of several


def without(fields, name):
    return {field: value for field, value in fields.items() if field != name}


HUB_DROP = {"passage": "P", "question": "Q", "answers_spans": {"spans": ["x"], "types": ["span"]}}
SIMPLE_DROP = {"context": "Passage: P\nAnswer:", "completion": " x", "ref_text": "x"}
NO_ANSWER = {"passage": "P", "question": "Q", "answer": annotated()}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("copa", without(COPA, "choice2"), "field 'choice2': got nothing, expected this field"),
        ("copa", COPA | {"premise": " "}, "field 'premise': got ' ', expected a text that is not empty"),
        ("copa", COPA | {"question": "why"}, "field 'question': got 'why', expected one of 'cause', 'effect'"),
        ("copa", COPA | {"label": -1}, "field 'label': got -1, expected one of 0, 1"),
        ("record", FLAT_RECORD | {"query": "Who?"}, r"field 'query': got 'Who\?', expected a .* with @placeholder"),
        ("record", FLAT_RECORD | {"entities": []}, r"field 'entities': got \[\], expected a list that is not empty"),
        ("record", FLAT_RECORD | {"entities": [1]}, r"field 'entities': got \[1\], expected a list of texts"),
        ("record", FLAT_RECORD | {"answers": ["Rome"]}, r"field 'answers': got \['Rome'\], expected .*entities \(Bern"),
        ("record", RECORD | {"passage": {"text": "Bern", "entities": [{"start": 2, "end": 4}]}},
         r"in 'passage', in 'entities\[0\]', field 'end': got 4, expected the place of .* from 2 to 3"),
        ("record", RECORD | {"qas": [{"query": "@placeholder", "idx": 0}]}, r"in 'qas\[0\]', field 'answers'"),
        ("squad", {"context": "C", "question": "Q", "answers": {"text": [], "answer_start": []}},
         r"in 'answers', field 'text': got \[\], expected a list that is not empty"),
        ("squad", {"context": "C", "question": "Q", "answers": [{"answer_start": 0}]},
         r"in 'answers\[0\]', field 'text': got nothing"),
        ("squad", {"context": "C", "question": "Q", "answers": "Bern"}, "field 'answers': got 'Bern', expected a list"),
        ("drop", SIMPLE_DROP | {"ref_text": "x| "}, r"field 'ref_text': got 'x\| ', expected answers that are not"),
        ("drop", without(SIMPLE_DROP, "completion"), "field 'completion': got nothing"),
        ("drop", HUB_DROP | {"answers_spans": {"spans": ["x", ""]}}, r"'answers_spans', field 'spans': got \['x', "),
        ("drop", NO_ANSWER, "field 'answer': got .*, expected a number, a date or spans"),
        ("drop", NO_ANSWER | {"validated_answers": [{"number": 3}]},
         r"in 'validated_answers\[0\]', field 'number': got 3, expected a text"),
        ("drop", NO_ANSWER | {"answer": {"number": "", "spans": []}}, "in 'answer', field 'date': got nothing"),
    ],
)  # fmt: skip
def test_a_malformed_row_names_its_field(name, fields, message):
    with pytest.raises(ValueError, match=rf"^row 1, .*{message}"):
        parse(name, fields)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("squad", squad_file(is_impossible=True, answers=[]),
         r"in 'data\[0\]', in 'paragraphs\[0\]', in 'qas\[0\]', field 'is_impossible': got True, expected .*v1\.1"),
        ("squad", {"data": [{"paragraphs": [{"qas": []}]}]}, r"in 'paragraphs\[0\]', field 'context': got nothing"),
        ("squad", [], r"got \[\], expected an object"),
        ("drop", drop_file(answer="3"), r"in 'nfl_1', in 'qa_pairs\[0\]', field 'answer': got '3', expected an object"),
        ("drop", {"nfl_1": "text"}, "field 'nfl_1': got 'text', expected an object"),
        ("drop", {"nfl_1": {"passage": "P", "qa_pairs": []}}, "in 'nfl_1', field 'qa_pairs': got .*, expected a list"),
        ("drop", '{"nfl_1": ', "line 1: not JSON"),
    ],
)  # fmt: skip
def test_a_malformed_nested_file_names_the_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=rf"dev\.json.*{message}"):
        read(name, tmp_path / "dev.json", content)


@pytest.mark.parametrize("name", ["squad", "drop"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"dev\.txt: expected a file that ends in \.json or \.jsonl"):
        read(name, tmp_path / "dev.txt", "")
