"""The eight commonsense tasks of DoTA, and mixtures of them such as Commonsense-170K.

Every task takes the rows of LLM-Adapters (see `llm_adapters`), which were made for this protocol, and the rows of the
original data set, as published or as on the Hub, which are given the same wording. Two originals hold more than
LLM-Adapters shows: the passages of BoolQ are left out, and the markup "[header]", "[title]", "[step]" of HellaSwag's
jsonl stays, although the text form of HellaSwag's validation set comes without it.

Formats of the originals:

- BoolQ: jsonl with question, answer (true or false) and passage.
- PIQA: jsonl with goal, sol1, sol2; the labels 0 and 1 in "X-labels.lst" beside "X.jsonl", or as the field label.
- SIQA: jsonl with context, question, answerA, answerB, answerC; the labels 1 to 3 likewise.
- HellaSwag: jsonl with activity_label, ctx, endings and label 0 to 3; or text, plain or compressed, with six lines a
  row: "activity: context", label, four endings.
- WinoGrande: jsonl with sentence, in which "_" is the blank, option1, option2 and answer 1 or 2.
- ARC and OpenBookQA: jsonl with question (stem, choices of label and text) and answerKey, or the Hub's rows with the
  question, or question_stem, as a text and two lists in choices.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from tensorpeft.tasks.llm_adapters import (
    ANSWERS,
    ENDINGS,
    FAMILIES,
    GENERATION,
    OPTIONS,
    SOLUTIONS,
    TRUE_FALSE,
    Labels,
    as_question,
    parse_row,
    score,
)
from tensorpeft.tasks.records import Record, read_json, read_lines
from tensorpeft.tasks.task import Question, QuestionTask

# What data sets write where a label is kept secret; a missing field counts too.
_WITHHELD = (None, "", "-1", "?")
_CHOOSE_ANSWER = "Please choose the correct answer to the question: "
_LINES_PER_ROW = 6


def _convert_boolq(record: Record) -> Question:
    question = record.text("question").strip().removesuffix("?")
    instruction = f"Please answer the following question with true or false, question: {question}?"
    answer = record.fields.get("answer")
    if not isinstance(answer, bool):
        raise _label_error(record, "answer", "true or false")
    return as_question(instruction, TRUE_FALSE, 0 if answer else 1, record.place)


def _convert_piqa(record: Record) -> Question:
    goal, solutions = record.text("goal"), (record.text("sol1"), record.text("sol2"))
    numbered = _number(SOLUTIONS, solutions, between="\n\n")
    instruction = f"Please choose the correct solution to the question: {goal}\n\n{numbered}"
    return as_question(instruction, SOLUTIONS, _gold(record, "label", ("0", "1")), record.place)


def _convert_siqa(record: Record) -> Question:
    answers = tuple(record.text(field) for field in ("answerA", "answerB", "answerC"))
    question = f"{record.text('context')} {record.text('question')}"
    return _ask(question, answers, _gold(record, "label", ("1", "2", "3")), record.place)


def _convert_hellaswag(record: Record) -> Question:
    endings = _texts(record, "endings")
    if len(endings) != len(ENDINGS):
        raise record.error("endings", f"{len(ENDINGS)} texts")
    sentence = f"{record.text('activity_label')}: {record.text('ctx')}"
    return as_question(
        f"Please choose the correct ending to complete the given sentence: {sentence}\n\n{_number(ENDINGS, endings)}",
        ENDINGS,
        _gold(record, "label", ("0", "1", "2", "3")),
        _key(record, "ind"),
    )


def _convert_winogrande(record: Record) -> Question:
    sentence, options = record.text("sentence"), (record.text("option1"), record.text("option2"))
    if "_" not in sentence:
        raise record.error("sentence", "a text with '_' where the blank is")
    lead = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    return as_question(
        f"{lead}{sentence}\n\n{_number(OPTIONS, options)}",
        OPTIONS,
        _gold(record, "answer", ("1", "2")),
        _key(record, "qID"),
        # The only one of the eight whose format stands on the line of the options.
        before_format=" ",
    )


def _convert_arc(record: Record) -> Question:
    """The question in a row of ARC or OpenBookQA. Whatever the labels are, A to E or 1 to 5, answers are numbered."""
    if isinstance(record.fields.get("question"), Mapping):
        published = record.record("question")
        stem, choices = published.text("stem"), published.records("choices")
        labels = tuple(choice.text("label") for choice in choices)
        answers = tuple(choice.text("text") for choice in choices)
    else:
        stem = record.text("question_stem" if record.has("question_stem") else "question")
        choices = record.record("choices")
        labels, answers = _texts(choices, "label"), _texts(choices, "text")
    if len(answers) != len(labels) or len(set(labels)) != len(labels) or not 2 <= len(answers) <= len(ANSWERS):
        raise ValueError(
            f"{record.place}: got the labels {', '.join(labels)} for {len(answers)} answers, expected two to "
            f"{len(ANSWERS)} answers, each with a label of its own. Correct or remove the row."
        )
    return _ask(stem, answers, _gold(record, "answerKey", labels), _key(record, "id"))


def _ask(question: str, answers: Sequence[str], gold: int, key: str) -> Question:
    labels = ANSWERS[: len(answers)]
    return as_question(f"{_CHOOSE_ANSWER}{question}\n\n{_number(labels, answers)}", labels, gold, key)


def _number(labels: Labels, texts: Sequence[str], between: str = " ") -> str:
    return between.join(f"{label.capitalize()}: {text}" for label, text in zip(labels, texts, strict=True))


def _texts(record: Record, field: str) -> tuple[str, ...]:
    """The texts in the list of a field."""
    items = {f"{field}[{number}]": item for number, item in enumerate(record.items(field))}
    row = Record(items, record.place)
    return tuple(row.text(name) for name in items)


def _gold(record: Record, field: str, values: Sequence[str]) -> int:
    """The index of a label among its possible values, which may be written as numbers too."""
    value = record.fields.get(field)
    if isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip() in values:
        return values.index(str(value).strip())
    raise _label_error(record, field, f"one of {', '.join(values)}")


def _label_error(record: Record, field: str, expected: str) -> ValueError:
    value = record.fields.get(field)
    if (str(value).strip() if isinstance(value, int | str) else value) in _WITHHELD:
        expected += "; it is withheld, as in test sets. Use a split whose labels are published"
    return record.error(field, expected)


def _key(record: Record, field: str) -> str:
    return str(record.fields.get(field, record.place))


def _read_with_labels(path: Path) -> Iterator[Record]:
    """The rows of a file; those of "X.jsonl" get the lines of "X-labels.lst", where there is one, as field label."""
    records = list(read_json(path))
    if ".jsonl" not in path.suffixes:
        yield from records
        return
    labels_path = path.with_name(f"{path.name.partition('.jsonl')[0]}-labels.lst")
    if not labels_path.is_file():
        for record in records:
            if not record.has("label") and not record.has("instruction"):
                raise ValueError(
                    f"{record.place}: no field 'label', and no file {labels_path}. Fetch that file too; where there is "
                    "none, the labels are withheld: use another split."
                )
            yield record
        return
    labels = list(read_lines(labels_path))
    if len(labels) != len(records):
        raise ValueError(
            f"{labels_path}: {len(labels)} lines, expected one for each of the {len(records)} rows of {path}. "
            "Fetch both files again."
        )
    for record, (place, label) in zip(records, labels, strict=True):
        if str(record.fields.get("label", label)) != label:
            raise record.error("label", f"{label!r} as in {place}")
        yield Record({**record.fields, "label": label}, record.place)


def _read_hellaswag(path: Path) -> Iterable[Record]:
    return _read_text_rows(path) if ".txt" in path.suffixes else read_json(path)


def _read_text_rows(path: Path) -> Iterator[Record]:
    """The rows of HellaSwag as text: "activity: context", label, four endings, a line each."""
    lines = [line for _, line in read_lines(path)]
    if len(lines) % _LINES_PER_ROW:
        raise ValueError(
            f"{path}: {len(lines)} lines, expected six a row: 'activity: context', label, four endings. "
            "Fetch the file again."
        )
    for start in range(0, len(lines), _LINES_PER_ROW):
        sentence, label, *endings = lines[start : start + _LINES_PER_ROW]
        activity, _, context = sentence.partition(": ")
        fields = {"activity_label": activity, "ctx": context, "label": label, "endings": endings}
        yield Record(fields, f"{path}, lines {start + 1} to {start + _LINES_PER_ROW}")


def _parse_mixture(record: Record) -> Sequence[Question]:
    return (parse_row(record, FAMILIES),)


def _parse(record: Record, labels: Labels, convert: Callable[[Record], Question]) -> Sequence[Question]:
    return (parse_row(record, (labels,)) if record.has("instruction") else convert(record),)


def _task(
    name: str,
    description: str,
    labels: Labels,
    convert: Callable[[Record], Question],
    read: Callable[[Path], Iterable[Record]] = read_json,
) -> QuestionTask:
    # partial, not a closure: a task must be picklable for data workers.
    parse = partial(_parse, labels=labels, convert=convert)
    return QuestionTask(name, description, read, parse, GENERATION, score)


TASKS: tuple[QuestionTask, ...] = (
    _task("boolq", "BoolQ: yes/no questions, without their passages.", TRUE_FALSE, _convert_boolq),
    _task("piqa", "PIQA: which of two ways reaches a goal?", SOLUTIONS, _convert_piqa, _read_with_labels),
    _task("siqa", "SIQA: questions on social situations, three answers.", ANSWERS, _convert_siqa, _read_with_labels),
    _task(
        "hellaswag", "HellaSwag: how does a text go on, of four endings?", ENDINGS, _convert_hellaswag, _read_hellaswag
    ),
    _task("winogrande", "WinoGrande: which of two names fills the blank?", OPTIONS, _convert_winogrande),
    _task("arc_easy", "ARC-Easy: school science questions, three to five answers.", ANSWERS, _convert_arc),
    _task("arc_challenge", "ARC-Challenge: the harder school science questions.", ANSWERS, _convert_arc),
    _task("openbookqa", "OpenBookQA: elementary science questions, four answers.", ANSWERS, _convert_arc),
    QuestionTask(
        name="commonsense",
        description="Any mixture of the eight commonsense tasks in the form of LLM-Adapters, as Commonsense-170K.",
        read=read_json,
        parse=_parse_mixture,
        generation=GENERATION,
        score=score,
    ),
)
