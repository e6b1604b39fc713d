r"""Word problems with a worked solution and one right answer: GSM8K, MATH, and MetaMathQA to train for both.

A response is the worked solution and a last line "The answer is: X", as MetaMathQA writes its own: for GSM8K the
published text without the calculator's marks (<<48/2=24>>), which no reader of the answer needs, and with its "#### N";
for MATH the published solution with its \boxed{X}.

Sources: Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168; Hendrycks et al.,
"Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874; Yu et al., "MetaMath", arXiv
2309.12284.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from tensorpeft.tasks.math_answers import find_answer, find_box, normalise_answer
from tensorpeft.tasks.prompts import instruction_prompt
from tensorpeft.tasks.records import Record, read_json, read_json_object, read_text
from tensorpeft.tasks.task import Generation, Question, QuestionTask, Scored

_TOLERANCE = 0.001
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
# A minus after a letter, digit or bracket is a subtraction or a hyphen. Groups of three before plain digits, so that
# "1,234" is one number and "1,2" are two.
_NUMBER = re.compile(
    r"((?<![\w)\]}%])[-−])?(?:\\?[$€£])?([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)"
)


def find_last_number(text: str) -> str | None:
    """The last number of a text, without currency and thousands separators; None where there is none.

    Nothing is evaluated: the last number of "3/4" is 4, that of "10-5" is 5.
    """
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    minus, digits = numbers[-1]
    return ("-" if minus else "") + digits.replace(",", "")


def score_number(text: str, question: Question) -> Scored:
    """Whether the last number of a text is the right one, up to 0.001."""
    found = find_last_number(text)
    right = found is not None and any(abs(float(found) - float(answer)) <= _TOLERANCE for answer in question.answers)
    return Scored(found, {"accuracy": float(right)})


def score_answer(text: str, question: Question) -> Scored:
    """Whether the last boxed answer of a text, or else the one it states last, is the right one as a string."""
    found = find_answer(text)
    answer = normalise_answer(found) if found else None
    return Scored(answer, {"accuracy": float(bool(answer) and answer in question.answers)})


def parse_gsm8k(
    record: Record,  # question, answer
) -> list[Question]:
    """The problem of a GSM8K row.

    Raises:
        ValueError: a field is missing or empty, or the answer does not end in "#### " and a number.
    """
    prompt = instruction_prompt(record.text("question"))
    solution = _CALCULATOR_MARK.sub("", record.text("answer")).strip()
    _, mark, answer = solution.rpartition("####")
    number = find_last_number(answer)
    if not mark or number is None or not _NUMBER.fullmatch(answer.strip()):
        raise record.error("answer", 'a text that ends in "#### " and a number')
    return [Question(prompt, f"{solution}\nThe answer is: {answer.strip()}", (number,), key=record.place)]


def parse_math(
    record: Record,  # problem, solution as published; context, chain_of_thought, answer in a later version
) -> list[Question]:
    """The problem of a MATH row.

    The right answer is what the solution's last box holds. A row that names an answer of its own means that one; where
    the two differ, as in a solution with two boxes, the last line of the response is boxed, so that it counts.

    Raises:
        ValueError: a field is missing or empty, or the solution has no box.
    """
    published = not record.has("context")
    prompt = instruction_prompt(record.text("problem" if published else "context"))
    field = "solution" if published else "chain_of_thought"
    solution = record.text(field).strip()
    box = find_box(solution)
    if box is None or not normalise_answer(box):
        raise record.error(field, "a solution whose last \\boxed{...} holds the answer")
    answer = record.text("answer") if record.has("answer") or not published else box
    compared = normalise_answer(answer)
    if not compared:
        raise record.error("answer", "more than units and spaces")
    stated = " ".join(answer.split())
    if compared != normalise_answer(box):
        stated = f"\\boxed{{{stated}}}"
    return [Question(prompt, f"{solution}\nThe answer is: {stated}", (compared,), key=record.place)]


def parse_metamath(
    record: Record,  # query, response; type and original_question are not used
) -> list[Question]:
    """The problem of a MetaMathQA row, whose response has the form of the others already.

    Raises:
        ValueError: a field is missing or empty.
    """
    return [Question(instruction_prompt(record.text("query")), record.text("response"), key=record.place)]


def _read_math(path: Path) -> Iterator[Record]:
    """The rows of a file, or of a folder as MATH was published: one problem per file."""
    if path.is_dir():
        files = sorted(path.rglob("*.json"))
        if not files:
            raise ValueError(f"{path}: no .json file in this folder, expected MATH with one problem per file.")
        for file in files:
            yield read_json_object(file)
    elif path.suffix == ".json" and read_text(path).lstrip().startswith("{"):
        yield read_json_object(path)
    else:
        yield from read_json(path)


_GENERATION = Generation(max_new_tokens=512, stop=("### Instruction:",))

TASKS: tuple[QuestionTask, ...] = (
    QuestionTask(
        name="gsm8k",
        description="GSM8K: grade school word problems; the last number of the answer counts",
        read=read_json,
        parse=parse_gsm8k,
        generation=_GENERATION,
        score=score_number,
    ),
    QuestionTask(
        name="math",
        description="MATH: competition problems; the boxed answer counts, up to notation",
        read=_read_math,
        parse=parse_math,
        generation=_GENERATION,
        score=score_answer,
    ),
    QuestionTask(
        name="metamath",
        description="MetaMathQA: problems rewritten from the training rows of GSM8K and MATH, to train on",
        read=read_json,
        parse=parse_metamath,
        generation=_GENERATION,
    ),
)
