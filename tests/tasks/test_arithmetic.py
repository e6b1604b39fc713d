"""GSM8K, MATH and MetaMathQA: every published row, and what counts as the answer of a generated text."""

import importlib.util
import itertools
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tensorpeft.tasks.arithmetic import TASKS, find_last_number
from tensorpeft.tasks.math_answers import find_answer, find_box, normalise_answer
from tensorpeft.tasks.records import Record, read_json

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data"
GSM8K, MATH, METAMATH = TASKS
needs_data = pytest.mark.skipif(
    not ((DATA / "gsm8k").is_dir() and (DATA / "math").is_dir()),
    reason=f"no gsm8k and math in {DATA}; set TENSORPEFT_DATA to the folder that holds data/",
)


def parse(task, **fields):
    (question,) = task.parse(Record(fields, "rows.jsonl, line 7"))
    return question


def accuracy(task, text, question):
    assert task.score is not None
    return task.score(text, question).metrics["accuracy"]


def parse_box(answer):
    return parse(MATH, problem="What is it?", solution=f"It is $\\boxed{{{answer}}}$.")


@needs_data
@pytest.mark.parametrize(
    ("task", "file", "num_rows"),
    [(GSM8K, "gsm8k/train.jsonl", 7473), (GSM8K, "gsm8k/test.jsonl", 1319), (MATH, "math/math.jsonl", 5000)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_published_row_parses_and_its_response_is_right(task, file, num_rows):
    questions = [question for record in task.read(DATA / file) for question in task.parse(record)]
    assert len(questions) == num_rows
    for question in questions:
        assert question.prompt.endswith("### Response:\n")
        assert "\nThe answer is: " in question.response
        assert "<<" not in question.response
        assert accuracy(task, question.response, question) == 1, question.key


@needs_data
def test_in_the_published_rows_the_box_is_the_answer():
    for record in read_json(DATA / "math" / "math.jsonl"):
        assert find_box(record.text("chain_of_thought")) == record.text("answer").strip(), record.place


@needs_data
def test_equality_is_that_of_an_independent_implementation_except_where_it_misreads_tex():
    theirs = load_lm_eval()
    answers = sorted({record.text("answer") for record in read_json(DATA / "math" / "math.jsonl")})
    assert len(answers) > 2000
    only_theirs = equal_pairs(answers, theirs.strip_string) - equal_pairs(answers, normalise_answer)
    only_ours = equal_pairs(answers, normalise_answer) - equal_pairs(answers, theirs.strip_string)
    # Each as it should be: a unit is at the end; \sqrt 5 is a root of 5; the denominator of \frac{6}3 is 3.
    twelves = ["12", "12 \\text{ gm}", "12\\text{ degrees}", "12\\text{ square units}"]
    assert only_theirs == {("19", "19 \\text{ and }43")} | {
        tuple(sorted((twelve, "12\\text{ and }13"))) for twelve in twelves
    }
    assert only_ours == {
        ("\\sqrt 5", "\\sqrt5"),
        ("\\sqrt 5", "\\sqrt{5}"),
        ("10\\sqrt 2", "10\\sqrt{2}"),
        ("\\frac{\\sqrt6}3", "\\frac{\\sqrt{6}}{3}"),
    }


def load_lm_eval():
    """Only the one file of lm-eval: its package imports much that is not needed here."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        pytest.skip("lm_eval is not installed")
    pytest.importorskip("datasets")
    file = Path(found.origin).parent / "tasks" / "hendrycks_math" / "utils.py"
    spec = importlib.util.spec_from_file_location("hendrycks_math_of_lm_eval", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def equal_pairs(answers, normalise):
    groups = defaultdict(list)
    for answer in answers:
        groups[normalise(answer)].append(answer)
    return {pair for group in groups.values() for pair in itertools.combinations(group, 2)}


@needs_data
@pytest.mark.parametrize(
    "rewrite",
    [
        lambda answer: answer.replace("\\frac", "\\dfrac"),
        lambda answer: re.sub(r"\\frac\{([0-9])\}\{([0-9])\}", r"\\tfrac\1\2", answer),
        lambda answer: re.sub(r"\\sqrt\{([0-9])\}", r"\\sqrt\1", answer),
        lambda answer: re.sub(r"([(,)+=-])", r"\1 ", answer),
        lambda answer: re.sub(r"^\(([^()]*)\)$", r"\\left(\1\\right)", answer),
        lambda answer: f"x = {answer}",
        lambda answer: f"{answer}\\text{{ units}}",
        lambda answer: f"\\${answer}",
        lambda answer: f"{answer}^\\circ",
    ],
    ids=["dfrac", "tfrac12", "sqrt2", "spaces", "left right", "x =", "units", "dollar", "degrees"],
)
def test_a_real_answer_in_other_notation_is_the_same_answer(rewrite):
    answers = {record.text("answer") for record in read_json(DATA / "math" / "math.jsonl")}
    # Not those with a unit or a left side: some rewritings would add a second one.
    plain = [answer for answer in answers if not re.search(r"\\text\{ |=", answer)]
    assert len(plain) > 1500
    assert [answer for answer in plain if normalise_answer(rewrite(answer)) != normalise_answer(answer)] == []


GSM8K_GENERATIONS = [
    ("She sold 48 + 24 = 72 clips.\n#### 72\nThe answer is: 72", "72"),
    ("The answer is: 1,234", "1234"),
    ("In total that is $1,234,567.89 for the house.", "1234567.89"),
    ("He pays $5.00", "5.00"),
    ("The temperature fell to -3 degrees.", "-3"),
    ("The account shows -$20.", "-20"),
    ("So there are 3.", "3"),
    ("The discount is 5%.", "5"),
    ("Each gets 3/4 of a pie", "4"),
    ("10-7=3", "3"),
    ("That leaves 10-7 apples", "7"),
    ("Pages 12-15 remain", "15"),
    ("The profit is \u22128 dollars", "-8"),
    ("It weighs .5 kg", ".5"),
    ("The pairs are 1,2 and 3,4", "4"),
    ("The winner was the 2nd runner", "2"),
    ("Cost: \\$18.50 (rounded).", "18.50"),
    ("x=-6", "-6"),
    ("I do not know.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), GSM8K_GENERATIONS)
def test_the_last_number_of_a_generation(text, number):
    assert find_last_number(text) == number


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("The answer is: 72", "72", 1.0),
        ("The answer is: 72.0009", "72", 1.0),
        ("The answer is: 72.002", "72", 0.0),
        ("The answer is: $1,450,000.00.", "1,450,000", 1.0),
        ("The answer is: -72", "72", 0.0),
        ("72 apples and 3 pears", "72", 0.0),
        ("seventy-two", "72", 0.0),
    ],
)
def test_a_gsm8k_generation_is_right_within_the_tolerance(text, gold, right):
    question = parse(GSM8K, question="How many?", answer=f"So many.\n#### {gold}")
    assert accuracy(GSM8K, text, question) == right


# (generated, right answer as boxed, what is found, whether it is right)
MATH_GENERATIONS = [
    (r"So $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}", r"\frac{1}{2}", True),
    (r"We get $\boxed{\dfrac12}$.", r"\frac{1}{2}", r"\dfrac12", True),
    (r"First \boxed{3}, but then \boxed{4}.", "3", "4", False),
    (r"Hence $\boxed{\left\{ 1, 2 \right\}}$.", r"\{1,2\}", r"\left\{ 1, 2 \right\}", True),
    (r"\boxed{5}. The answer is: 6", "5", "5", True),
    ("The answer is: 1/2", r"\frac{1}{2}", "1/2", True),
    ("The answer is: 0.5", r"\frac{1}{2}", "0.5", True),
    ("The answer is: 0.25", r"\frac{1}{4}", "0.25", False),
    ("The answer is: $x = 7$.", "7", "x = 7", True),
    ("The final answer is $12$. I hope it is correct.", r"12\text{ cm}", "12", True),
    (r"The answer is: 45^\circ", "45", r"45^\circ", True),
    (r"Thus it costs $\boxed{\$15.48}$.", "15.48", r"\$15.48", True),
    ("Answer is: 30%", r"30\%", "30%", True),
    (r"The answer is $\boxed 5$ and nothing else.", "5", "5", True),
    (r"\[\fbox{2\sqrt3}\]", r"2\sqrt{3}", r"2\sqrt3", True),
    (r"Therefore \boxed{.75}", "0.75", ".75", True),
    (r"It is \boxed{10,\!080}", "10,080", r"10,\!080", True),
    (r"It is \boxed{10080}", "10,080", "10080", False),
    (r"The sum is \boxed{\frac{1}{2", r"\frac{1}{2}", None, False),
    ("I cannot solve this.", "0", None, False),
]


@pytest.mark.parametrize(("text", "gold", "found", "right"), MATH_GENERATIONS)
def test_the_answer_of_a_math_generation(text, gold, found, right):
    assert find_answer(text) == found
    assert accuracy(MATH, text, parse_box(gold)) == right


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (r"\frac\pi4", r"\frac{\pi}{4}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{\sqrt 6}3", r"\frac{\sqrt{6}}{3}"),
        (r"-\tfrac 34", r"-\frac{3}{4}"),
        (r"-3/4", r"\frac{-3}{4}"),  # as published: not the same string as -\frac{3}{4}
        (r"440\text{ cm}^2", "440"),
        (r"90\text{ square" + "\n" + r"units}.", "90"),
        (r"\text{ even}", r"\text{even}"),
        (r"12\text{ and }13", r"12\text{and}13"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
        ("(.5, -.25)", "(0.5,-0.25)"),
        ("k = 15", "15"),
        ("y = 2x + 3", "2x+3"),
        ("f(x)=3", "f(x)=3"),
        ("x^2 + y^2 = 13", "x^2+y^2=13"),
        (r"3\leftarrow 4", r"3\leftarrow4"),
        (r"25^{\circ}", "25"),
        (r"\frac", r"\frac"),
        (r"\sqrt", r"\sqrt"),
    ],
)
def test_the_form_in_which_answers_are_compared(answer, normal):
    assert normalise_answer(answer) == normal


def test_a_gsm8k_row():
    question = parse(
        GSM8K, question="How many?", answer="May: 48/2 = <<48/2=24>>24.\nSum: $<<48+24=72>>1,072.\n#### 1,072"
    )
    assert question.response == "May: 48/2 = 24.\nSum: $1,072.\n#### 1,072\nThe answer is: 1,072"
    assert question.answers == ("1072",)
    assert question.key == "rows.jsonl, line 7"
    assert "### Instruction:\nHow many?\n\n### Response:\n" in question.prompt


def test_the_published_math_row_and_the_later_one_are_the_same_question():
    solution = r"Half of it, so $\boxed{\frac12}$."
    published = parse(MATH, problem="How much?", solution=solution, level="Level 1", type="Algebra")
    later = parse(MATH, context="How much?", chain_of_thought=solution, answer=r"\frac12", category="algebra")
    assert published == later
    assert published.response == solution + "\n" + r"The answer is: \frac12"
    assert published.answers == (r"\frac{1}{2}",)


def test_an_answer_that_differs_from_the_last_box_is_the_one_that_counts():
    question = parse(MATH, problem="Which?", solution=r"Either $\boxed{-2}$ or $\boxed{1}$.", answer="1, -2")
    assert question.answers == ("1,-2",)
    assert question.response.endswith("\nThe answer is: \\boxed{1, -2}")
    assert accuracy(MATH, question.response, question) == 1


def test_a_metamath_row_is_kept_as_it_is_and_has_no_score():
    response = "It is 3.\n#### 3\nThe answer is: 3"
    question = parse(METAMATH, query="1 + 2?", response=response, type="GSM_AnsAug", original_question="1 + 2?")
    assert question.response == response
    assert question.answers == ()
    assert METAMATH.score is None


def test_math_is_read_from_one_file_per_problem(tmp_path):
    for name in ("algebra/2.json", "algebra/1.json", "geometry/1.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"problem": "{name}",\n "solution": "$\\\\boxed{{3}}$"}}', encoding="utf-8")
    assert [record.text("problem") for record in MATH.read(tmp_path)] == [
        "algebra/1.json",
        "algebra/2.json",
        "geometry/1.json",
    ]
    (record,) = MATH.read(tmp_path / "geometry" / "1.json")
    assert MATH.parse(record)[0].answers == ("3",)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no \.json file"):
        list(MATH.read(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (GSM8K, {"question": "q", "answer": "It is 72."}, r"field 'answer': got 'It is 72\.', expected .*#### "),
        (GSM8K, {"question": "q", "answer": "#### many"}, r"field 'answer': got '#### many'"),
        (GSM8K, {"question": "q", "answer": "#### 3 or 4"}, r"field 'answer'"),
        (GSM8K, {"question": "q", "answer": "#### 72\nso"}, r"field 'answer'"),
        (GSM8K, {"question": " ", "answer": "#### 72"}, r"field 'question': got ' '"),
        (GSM8K, {"answer": "#### 72"}, r"field 'question': got nothing"),
        (MATH, {"problem": "p", "solution": "It is 5."}, r"field 'solution': got 'It is 5\.', expected .*boxed"),
        (MATH, {"problem": "p", "solution": r"\boxed{3"}, r"field 'solution'"),
        (MATH, {"problem": "p", "solution": r"\boxed{ }"}, r"field 'solution'"),
        (MATH, {"problem": "p", "solution": r"\boxed{3}", "answer": r"\$"}, r"field 'answer'"),
        (MATH, {"problem": "p"}, r"field 'solution': got nothing"),
        (MATH, {"question": "p", "solution": r"\boxed{3}"}, r"field 'problem': got nothing"),
        (MATH, {"context": "p", "chain_of_thought": r"\boxed{3}"}, r"field 'answer': got nothing"),
        (METAMATH, {"query": "q", "response": ""}, r"field 'response': got ''"),
        (METAMATH, {"response": "r"}, r"field 'query': got nothing"),
    ],
)
def test_a_malformed_row_names_place_and_field(task, fields, message):
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 7, {message}"):
        parse(task, **fields)
