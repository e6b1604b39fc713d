"""COPA, ReCoRD, SQuAD and DROP as language modelling: a prompt, and the answer as what follows it.

These are the question answering tasks of the LoRTA paper (arXiv 2410.04060, section 4.1), with prompts after the manner
of MeZO (Malladi et al., arXiv 2305.17333), which it follows. COPA and ReCoRD have choices, to be ranked by likelihood;
answers to all four can also be generated and scored as text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tensorpeft.tasks.records import Record, read_json, read_json_object
from tensorpeft.tasks.span_scores import SPAN_SEPARATOR, drop_scores, squad_normal_form, squad_scores
from tensorpeft.tasks.task import Generation, Question, QuestionTask, Scored

_GENERATION = Generation(max_new_tokens=32, stop=("\n",))
_PLACEHOLDER = "@placeholder"


def _parse_copa(record: Record) -> list[Question]:
    """The premise and "because" or "so" as the prompt, the two alternatives as what may follow."""
    premise = record.text("premise").strip().removesuffix(".")
    conjunction = record.choice("question", {"cause": "because", "effect": "so"})
    alternatives = [_as_clause(record.text(field)) for field in ("choice1", "choice2")]
    gold = record.choice("label", {0: 0, 1: 1})
    choices = tuple(f" {alternative}" for alternative in alternatives)
    return [
        Question(
            prompt=f"{premise} {conjunction}",
            response=choices[gold],
            answers=(alternatives[gold],),
            choices=choices,
            gold=gold,
            key=_key(record, "idx"),
        )
    ]


def _as_clause(sentence: str) -> str:
    """The sentence as it stands after a conjunction: without its capital, unless that is the word I."""
    sentence = sentence.strip()
    return sentence if re.match(r"I\b", sentence) else sentence[0].lower() + sentence[1:]


def _score_copa(text: str, question: Question) -> Scored:
    """Whether the text is the right alternative, or begins with it; letter case, articles, punctuation do not count.

    Of two alternatives that the text begins with, it is the longer one.
    """
    words = squad_normal_form(text)
    found = [choice.strip() for choice in question.choices if f"{words} ".startswith(f"{squad_normal_form(choice)} ")]
    answer = max(found, key=len, default=None)
    return Scored(answer, {"accuracy": float(answer in question.answers)})


def _parse_record(record: Record) -> list[Question]:
    """The questions about one passage as SuperGLUE publishes it, or the one question of a row of the Hub."""
    if not record.has("qas"):
        entities, answers = _texts(record, "entities"), _texts(record, "answers")
        return [_cloze(record, record.text("passage"), entities, answers, key=_key(record.record("idx"), "query"))]
    passage = record.record("passage")
    text = passage.text("text")
    entities = [_mention(span, text) for span in passage.records("entities")]
    return [
        _cloze(qa, text, entities, [answer.text("text") for answer in qa.records("answers")], key=_key(qa, "idx"))
        for qa in record.records("qas")
    ]


def _mention(span: Record, passage: str) -> str:
    """The characters from "start" to "end", both included."""
    start, end = span.number("start"), span.number("end")
    if start % 1 or end % 1 or not 0 <= start <= end < len(passage):
        raise span.error("end", f"the place of a mention's last character, from {start:g} to {len(passage) - 1}")
    return passage[int(start) : int(end) + 1]


def _cloze(query: Record, passage: str, entities: Sequence[str], answers: Sequence[str], key: str) -> Question:
    """The query with a blank, and the distinct entities as choices; those that match an answer are right."""
    sentence = query.text("query")
    if _PLACEHOLDER not in sentence:
        raise query.error("query", f"a sentence with {_PLACEHOLDER}")
    entities = list(dict.fromkeys(entities))
    # As the metric compares them, so that the right choices are those that score.
    right = {squad_normal_form(answer) for answer in answers}
    found = [index for index, entity in enumerate(entities) if squad_normal_form(entity) in right]
    if not found:
        raise query.error("answers", f"at least one of the passage's entities ({', '.join(entities)})")
    choices = tuple(f" {entity}" for entity in entities)
    return Question(
        prompt=_reading_prompt(
            re.sub(r"\n@highlight\s+", "\n- ", passage), f"Fill in the blank: {sentence.replace(_PLACEHOLDER, '_____')}"
        ),
        response=choices[found[0]],
        answers=tuple(dict.fromkeys(answers)),
        choices=choices,
        gold=found[0],
        key=key,
        also_gold=tuple(found[1:]),
    )


def _read_squad(path: Path) -> Iterator[Record]:
    """A row per question of the nested .json as published, or of JSON lines with the rows of the Hub."""
    if ".json" not in path.suffixes:
        yield from read_json(path)
        return
    for article in read_json_object(path).records("data"):
        for paragraph in article.records("paragraphs"):
            context = paragraph.text("context")
            for qa in paragraph.records("qas"):
                yield Record({**qa.fields, "context": context}, qa.place)


def _parse_squad(record: Record) -> list[Question]:
    """Context and question as the prompt, the first answer as the response."""
    if record.fields.get("is_impossible"):
        raise record.error("is_impossible", "false or no such field, as in SQuAD v1.1: every question has an answer")
    if isinstance(record.fields.get("answers"), Mapping):
        answers = _texts(record.record("answers"), "text")
    else:
        answers = [answer.text("text") for answer in record.records("answers")]
    return [
        Question(
            prompt=_reading_prompt(record.text("context"), record.text("question")),
            response=f" {_one_line(answers[0])}",
            answers=tuple(dict.fromkeys(answers)),
            key=_key(record, "id"),
        )
    ]


def _score_squad(text: str, question: Question) -> Scored:
    return Scored(text.strip() or None, squad_scores(text, question.answers))


def _read_drop(path: Path) -> Iterator[Record]:
    """A row per question of the nested .json as published, or of JSON lines of simple-evals or the Hub."""
    if ".json" not in path.suffixes:
        yield from read_json(path)
        return
    file = read_json_object(path)
    for passage_id, fields in file.fields.items():
        section = file.part(fields, passage_id)
        passage = section.text("passage")
        for qa in section.records("qa_pairs"):
            yield Record({**qa.fields, "passage": passage}, qa.place)


def _parse_drop(record: Record) -> list[Question]:
    r"""The question of a row: passage and question as the prompt, the first answer as the response.

    In ``answers``, "\n" separates the spans of an answer that has several, " and " in the response. Three forms:

    - as published (number, date or spans per annotator): the official evaluation's answers, spans kept apart.
    - of OpenAI's simple-evals ("ref_text"): spans are joined with " and " already, and some spans have an " and " of
      their own, so that they cannot be told apart. An answer is one span, as simple-evals scores it; the order of
      joined spans matters for the exact match, and F1 is that of their words together.
    - of the Hub ("answers_spans"): the spans of all annotators are in one list; each is an answer, as MeZO has it.
    """
    if record.has("ref_text"):
        prompt, response = record.text("context").rstrip(), record.text("completion")
        answers = [(text,) for text in record.text("ref_text").split("|")]
        if not all(text.strip() for (text,) in answers):
            raise record.error("ref_text", "answers that are not empty between the signs |")
    else:
        prompt = _reading_prompt(record.text("passage"), record.text("question"))
        if record.has("answers_spans"):
            answers = [(text,) for text in _texts(record.record("answers_spans"), "spans")]
        else:
            answers = _annotated_answers(record)
        response = SPAN_SEPARATOR.join(answers[0])
    return [
        Question(
            prompt=prompt,
            response=f" {_one_line(response)}",
            answers=tuple(dict.fromkeys("\n".join(map(_one_line, answer)) for answer in answers)),
            key=_key(record, "query_id"),
        )
    ]


def _annotated_answers(record: Record) -> list[tuple[str, ...]]:
    """The spans of the answer and of the validated ones; an annotator who gave none does not count, as officially."""
    given = [record.record("answer")]
    if record.fields.get("validated_answers"):
        given += record.records("validated_answers")
    answers = [spans for spans in map(_spans, given) if spans]
    if not answers:
        raise record.error("answer", "a number, a date or spans, here or in a validated answer")
    return answers


def _spans(answer: Record) -> tuple[str, ...]:
    """The number; without one, the spans; without spans, the date: the official order. Nothing where all are empty."""
    number = answer.text("number", may_be_empty=True).strip()
    if number:
        return (number,)
    if answer.fields.get("spans"):
        return tuple(_texts(answer, "spans"))
    date = answer.record("date")
    parts = [date.text(part, may_be_empty=True).strip() for part in ("day", "month", "year")]
    return (" ".join(filter(None, parts)),) if any(parts) else ()


def _score_drop(text: str, question: Question) -> Scored:
    return Scored(text.strip() or None, drop_scores(text, [answer.split("\n") for answer in question.answers]))


def _reading_prompt(passage: str, question: str) -> str:
    return f"Passage: {passage.strip()}\nQuestion: {question.strip()}\nAnswer:"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _texts(record: Record, field: str) -> list[str]:
    texts = record.items(field)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise record.error(field, "a list of texts that are not empty")
    return texts


def _key(record: Record, field: str) -> str:
    """The published identifier, or the place of the row where it has none."""
    return str(record.fields[field]) if record.has(field) else record.place


TASKS: tuple[QuestionTask, ...] = (
    QuestionTask(
        name="copa",
        description="COPA: which of two sentences is the cause or the effect of a premise? (SuperGLUE)",
        read=read_json,
        parse=_parse_copa,
        generation=_GENERATION,
        score=_score_copa,
    ),
    QuestionTask(
        name="record",
        description="ReCoRD: which entity of a news article fills the blank in a sentence about it? (SuperGLUE)",
        read=read_json,
        parse=_parse_record,
        generation=_GENERATION,
        score=_score_squad,
    ),
    QuestionTask(
        name="squad",
        description="SQuAD v1.1: which words of a paragraph answer a question about it?",
        read=_read_squad,
        parse=_parse_squad,
        generation=_GENERATION,
        score=_score_squad,
    ),
    QuestionTask(
        name="drop",
        description="DROP: questions about a paragraph that need counting, sorting or arithmetic.",
        read=_read_drop,
        parse=_parse_drop,
        generation=_GENERATION,
        score=_score_drop,
    ),
)
