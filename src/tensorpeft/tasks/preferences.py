"""Preference data: a prompt, a preferred and a rejected response, for DPO and its relatives.

A row is in one of the forms in which such pairs are published, known by its fields:

| fields | of |
|---|---|
| input: {messages}, preferred_output, non_preferred_output: [{role, content}] | OpenAI |
| conversations: [{from, value}, ...], chosen, rejected: {from, value} | ShareGPT |
| instruction, input, chosen, rejected, and perhaps output | Alpaca |
| system, question, chosen, rejected | Intel/orca_dpo_pairs |
| prompt, chosen, rejected | TRL; all texts, which are used as they stand, or messages |
| system, input, chosen, rejected | argilla/distilabel-intel-orca-dpo-pairs |
| chosen, rejected: [{role, content}, ...] | TRL without a prompt: it is what both begin with |

A prompt in messages, or with a system text, is a `conversation_prompt`. In TRL's form ``chosen`` and ``rejected`` may
repeat the conversation before the response, and ``prompt`` may then be the text of one of its messages.

A row that states no preference is an error, with two kinds in published data:

- argilla's pairs have ties, ``status == "tie"``, whose order means nothing. A recipe leaves them out with
  ``{hub: argilla/distilabel-intel-orca-dpo-pairs, split: train, drop: {status: [tie]}}``.
- chosen and rejected are the same text, in most forms a sign of a mistaken column. Rows with an ``output`` are let
  through when it is that same text too: one of their two responses is a rewrite of the output, and this one left it
  unchanged (6 of the 1100 pairs of instruction-data-with-preference.json). The gradient of DPO is zero on them.

Source: Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290.
"""

from collections.abc import Callable, Sequence

from tensorpeft.tasks.instructions import Message, alpaca_prompt, conversation_prompt, example_key, read_messages
from tensorpeft.tasks.records import Record, read_json
from tensorpeft.tasks.task import Preference, PreferenceTask


def parse_preference(record: Record) -> list[Preference]:
    """The pair in a row.

    Raises:
        ValueError: the row is in none of the forms, a field of its form is missing, empty or of the wrong type, or the
            row states no preference.
    """
    if record.fields.get("status") == "tie":
        raise record.error(
            "status", "a pair of which one is preferred (in a recipe, drop: {status: [tie]} beside hub leaves ties out)"
        )
    for fields, parse in _FORMS.items():
        if record.has(*fields):
            pair = parse(record)
            _check_difference(record, pair)
            return [pair]
    raise ValueError(
        f"{record.place}: fields {', '.join(map(str, record.fields))}; expected those of one form: "
        f"{'; or '.join(', '.join(fields) for fields in _FORMS)}. Rename the fields."
    )


def _check_difference(record: Record, pair: Preference) -> None:
    same = pair.chosen.strip() == pair.rejected.strip()
    if same and record.fields.get("output") != pair.chosen:
        field = "rejected" if record.has("rejected") else "non_preferred_output"
        raise record.error(field, "a response other than the preferred one")


def _parse_openai(record: Record) -> Preference:
    before = read_messages(record.record("input"), "messages")
    return _parse_messages(record, before, "preferred_output", "non_preferred_output")


def _parse_sharegpt(record: Record) -> Preference:
    return _parse_messages(record, read_messages(record, "conversations"))


def _parse_alpaca(record: Record) -> Preference:
    return _parse_texts(record, alpaca_prompt(record))


def _parse_orca(record: Record, question: str) -> Preference:
    system = Message("system", record.text("system", may_be_empty=True))
    return _parse_texts(record, conversation_prompt([system, Message("user", record.text(question))]))


def _parse_trl(record: Record) -> Preference:
    if isinstance(record.fields.get("chosen"), str):
        return _parse_texts(record, record.text("prompt"))
    if not isinstance(record.fields.get("prompt"), str):
        return _parse_messages(record, read_messages(record, "prompt") if record.has("prompt") else [])
    asked = [text for role, text in read_messages(record, "chosen") if role == "user"]
    if record.text("prompt").strip() not in map(str.strip, asked):
        raise record.error("prompt", "the text of a user's message in 'chosen', or a list of messages")
    return _parse_messages(record, [])


def _parse_texts(record: Record, prompt: str) -> Preference:
    return Preference(prompt, record.text("chosen"), record.text("rejected"), key=example_key(record))


def _parse_messages(
    record: Record, before: Sequence[Message], chosen_field: str = "chosen", rejected_field: str = "rejected"
) -> Preference:
    """The pair whose responses are the last messages of two conversations that are the same up to there."""
    chosen = read_messages(record, chosen_field, before)
    rejected = read_messages(record, rejected_field, before)
    for field, messages in ((chosen_field, chosen), (rejected_field, rejected)):
        if messages[-1].role != "assistant":
            raise record.error(field, "messages of which the last is the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise record.error(rejected_field, f"the messages of {chosen_field!r} up to the last one")
    return Preference(conversation_prompt(chosen[:-1]), chosen[-1].text, rejected[-1].text, key=example_key(record))


# The fields that tell a form -> how its rows are read; the first form that fits is taken.
_FORMS: dict[tuple[str, ...], Callable[[Record], Preference]] = {
    ("input", "preferred_output"): _parse_openai,
    ("conversations",): _parse_sharegpt,
    ("instruction",): _parse_alpaca,
    ("system", "question"): lambda record: _parse_orca(record, "question"),
    ("prompt",): _parse_trl,
    ("system", "input"): lambda record: _parse_orca(record, "input"),
    ("chosen", "rejected"): _parse_trl,
}

TASKS = (
    PreferenceTask(
        name="preferences",
        description="Pairs of responses to a prompt, of which the first is preferred.",
        read=read_json,
        parse=parse_preference,
    ),
)
