"""The protocol of LLM-Adapters for commonsense questions: one wording of the answers, one way to find them in a text.

A row of its files has ``instruction``, ``input``, ``output`` ("the correct answer is solution1") and ``answer``. The
instruction ends with "Answer format:" and the labels that may be answered. A model writes freely; the first label of
the family in its text is its answer, in lower case only, and a text without one is wrong.

Source: Hu et al., "LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models",
arXiv 2304.01933, and the evaluation published with it, which DoTA follows.
"""

import re
from collections.abc import Sequence

from tensorpeft.tasks.prompts import instruction_prompt
from tensorpeft.tasks.records import Record
from tensorpeft.tasks.task import Generation, Question, Scored

Labels = tuple[str, ...]

TRUE_FALSE: Labels = ("true", "false")
SOLUTIONS: Labels = ("solution1", "solution2")
ANSWERS: Labels = ("answer1", "answer2", "answer3", "answer4", "answer5")
ENDINGS: Labels = ("ending1", "ending2", "ending3", "ending4")
OPTIONS: Labels = ("option1", "option2")
FAMILIES: tuple[Labels, ...] = (TRUE_FALSE, SOLUTIONS, ANSWERS, ENDINGS, OPTIONS)

GENERATION = Generation(max_new_tokens=32, num_beams=4)

_RESPONSE = "### Response:"
_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")


def as_question(
    instruction: str,  # without the line of the answer format
    labels: Labels,  # of this row, in order
    gold: int,  # index of the right label
    key: str,
    before_format: str = "\n\n",
) -> Question:
    """The question that LLM-Adapters makes of an instruction and its labels."""
    instruction += f"{before_format}Answer format: {'/'.join(labels)}"
    return _question(instruction_prompt(instruction), _response(labels[gold]), labels, gold, key)


def parse_row(
    record: Record,
    families: Sequence[Labels] = FAMILIES,  # the families that the task has
) -> Question:
    """The question in a row of an LLM-Adapters file.

    Raises:
        ValueError: the labels are of no family, the answer is none of them, or the output does not name the answer.
    """
    instruction = record.text("instruction")
    labels = _labels(record, instruction, families)
    gold = record.choice("answer", {label: index for index, label in enumerate(labels)})
    output = record.text("output")
    if find_label(output, labels[gold]) != labels[gold]:
        raise record.error("output", f"a text whose first label is the answer, {labels[gold]!r}")
    prompt = instruction_prompt(instruction, record.text("input", may_be_empty=True))
    return _question(prompt, output, labels, gold, record.place)


def find_label(
    text: str,
    like: str,  # a label of the family
) -> str | None:
    """The first label in a text of the family that ``like`` belongs to; None: there is none.

    As in the protocol, labels are found within words ("untrue", "answer12"), and "answer5" even where a question has
    fewer answers.
    """
    family = next(labels for labels in FAMILIES if like in labels)
    found = re.search("|".join(family), text)
    return found[0] if found else None


def score(
    text: str,  # what was generated after the prompt, or with the prompt before it
    question: Question,
) -> Scored:
    """The accuracy, 1 or 0, of the first label in a generated text."""
    before, *after = text.split(_RESPONSE)
    first_line = question.prompt.partition("\n")[0]
    # A model that has answered often goes on with an instruction and "### Response:" of its own. So the marker only
    # counts where the prompt, or nothing, is before it; and whatever follows another marker is never the answer.
    response = after[0] if after and (not before.strip() or before.lstrip().startswith(first_line)) else before
    answer = find_label(response, question.answers[0])
    return Scored(answer, {"accuracy": float(answer in question.answers)})


def _labels(record: Record, instruction: str, families: Sequence[Labels]) -> Labels:
    """The labels that an instruction asks for."""
    found = _FORMAT.search(instruction)
    labels = tuple(found[1].split("/")) if found else ()
    for family in families:
        # Only the number of answers differs from row to row: two to five.
        if labels == family or (family == ANSWERS and len(labels) > 1 and labels == family[: len(labels)]):
            return labels
    got = f"'Answer format: {found[1]}'" if found else "no 'Answer format:'"
    raise ValueError(
        f"{record.place}, field 'instruction': {got} at its end, expected "
        f"{' or '.join('/'.join(family) for family in families)}. Correct the row, or choose its task."
    )


def _response(label: str) -> str:
    return f"the correct answer is {label}"


def _question(prompt: str, response: str, labels: Labels, gold: int, key: str) -> Question:
    choices = tuple(_response(label) for label in labels)
    return Question(prompt, response, answers=(labels[gold],), choices=choices, gold=gold, key=key)
