"""Instruction tuning data: an instruction, and the response to learn. Nothing is scored, so only a loss is reported.

A row is in one of the forms in which such data is published, known by its fields:

| fields | of |
|---|---|
| instruction, instances: [{input, output}, ...] | Self-Instruct's seed tasks; an example per instance |
| instruction, input, output | Alpaca; the input may be empty or absent |
| messages: [{role, content}, ...] | OpenAI and the Hub |
| conversations: [{from, value}, ...] | ShareGPT |
| prompt, response | dolly_hhrlhf, whose prompts are in Alpaca's template already: both are used as they stand |

An instruction stands in Alpaca's template. A conversation becomes `conversation_prompt` of all its messages but the
last, and its last message is the response: earlier answers are read, not learned.

An empty response is an error. The published files that the tests read have none; those of the original Alpaca data on
the Hub do: take a cleaned version, such as yahma/alpaca-cleaned, or leave them out with ``drop: {output: [""]}``.

Sources: Wang et al., "Self-Instruct", arXiv 2212.10560; Taori et al., "Stanford Alpaca", 2023.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tensorpeft.tasks.prompts import instruction_prompt
from tensorpeft.tasks.records import Record, read_json
from tensorpeft.tasks.task import Question, QuestionTask

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# Role -> the roles that may follow it; None is the beginning.
_NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


class Message(NamedTuple):
    """One message of a conversation; its role is "system", "user" or "assistant"."""

    role: str
    text: str


def read_messages(record: Record, field: str, before: Sequence[Message] = ()) -> list[Message]:
    """The conversation ``before``, continued by the messages in a field: a list of them, or just one.

    A message is {role, content}, or {from, value} as in ShareGPT. At most one system message, which may be empty,
    comes first; then user and assistant take turns.

    Raises:
        ValueError: a message lacks a field, is empty, or is not of a role whose turn it is.
    """
    one = isinstance(record.fields.get(field), Mapping)
    messages = list(before)
    for part in [record.record(field)] if one else record.records(field):
        role_field, text_field = ("from", "value") if part.has("from") else ("role", "content")
        role = part.choice(role_field, _ROLES)
        allowed = _NEXT[messages[-1].role if messages else None]
        if role not in allowed:
            raise part.error(role_field, f"a message of {' or '.join(allowed)} at this point of the conversation")
        messages.append(Message(role, part.text(text_field, may_be_empty=role == "system")))
    return messages


def conversation_prompt(messages: Sequence[Message]) -> str:
    r"""The prompt that asks for the answer to the last of ``messages``, which is the user's.

    The system text and an empty line, where there is one; the first user text in Alpaca's template; then for every
    later turn the answer so far and "\n\n### Instruction:\n", the user's text, "\n\n### Response:\n".
    """
    has_system = messages[0].role == "system"
    first, *later = messages[1:] if has_system else messages
    assert [first, *later][-1].role == "user", "a prompt ends with the user's message"
    prompt = instruction_prompt(first.text)
    for role, text in later:
        prompt += text if role == "assistant" else f"\n\n### Instruction:\n{text}\n\n### Response:\n"
    return f"{messages[0].text}\n\n{prompt}" if has_system and messages[0].text.strip() else prompt


def example_key(record: Record) -> str:
    """The published identifier of a row, or its place where it has none."""
    identifier = record.fields.get("id")
    return record.place if identifier in (None, "") else str(identifier)


def parse_instruction(record: Record) -> list[Question]:
    """The questions in a row: one, or one per instance of a seed task.

    Raises:
        ValueError: the row is in none of the forms, or a field of its form is missing, empty or of the wrong type.
    """
    for field, parse in _FORMS.items():
        if record.has(field):
            return parse(record)
    raise ValueError(
        f"{record.place}: fields {', '.join(map(str, record.fields))}; expected one of {', '.join(_FORMS)}. "
        "Rename the fields."
    )


def _parse_seed_task(record: Record) -> list[Question]:
    instruction, instances, key = record.text("instruction"), record.records("instances"), example_key(record)
    keys = [key] if len(instances) == 1 else [f"{key}, instance {number}" for number in range(len(instances))]
    return [
        Question(instruction_prompt(instruction, _input_of(instance)), instance.text("output"), key=key)
        for key, instance in zip(keys, instances, strict=True)
    ]


def _parse_alpaca(record: Record) -> list[Question]:
    return [Question(alpaca_prompt(record), record.text("output"), key=example_key(record))]


def alpaca_prompt(record: Record) -> str:
    """The prompt of a row's instruction and input; the input may be empty or absent."""
    return instruction_prompt(record.text("instruction"), _input_of(record))


def _input_of(record: Record) -> str:
    return record.text("input", may_be_empty=True) if record.has("input") else ""


def _parse_conversation(record: Record, field: str) -> list[Question]:
    *before, last = read_messages(record, field)
    if last.role != "assistant":
        raise record.error(field, "a conversation whose last message is the assistant's, which is learned")
    return [Question(conversation_prompt(before), last.text, key=example_key(record))]


def _parse_prompted(record: Record) -> list[Question]:
    return [Question(record.text("prompt"), record.text("response"), key=example_key(record))]


# The field that tells a form -> how its rows are read. In this order: chats on the Hub repeat their prompt as a field.
_FORMS: dict[str, Callable[[Record], list[Question]]] = {
    "instances": _parse_seed_task,
    "instruction": _parse_alpaca,
    "messages": lambda record: _parse_conversation(record, "messages"),
    "conversations": lambda record: _parse_conversation(record, "conversations"),
    "prompt": _parse_prompted,
}

TASKS = (
    QuestionTask(
        name="instructions",
        description="Instructions and the responses to them, judged by their loss only.",
        read=read_json,
        parse=parse_instruction,
    ),
)
