"""Plain text for language modelling: the prompt is empty, and the text is what the model learns to write.

There is a task per kind of file; each of them also takes .json and .jsonl files, and rows of the Hub, with a ``text``.

- ``stories`` is TinyStories: a story between two "<|endoftext|>", without the white space around it. A story does not
  need a separator after it at the end of the file, so that a sample cut in mid-sentence, such as the first 2 MiB of
  the training file, ends with a part of a story. It is kept, because nothing tells it from a whole one.
- ``wikitext`` is WikiText, 2 or 103, tokenised or raw: an article from its title line to the next one, without the
  empty lines at its end. A title is a line " = Title = " with an empty line before and after it; section titles have
  more signs. Salesforce/wikitext on the Hub has a row per line, which is no article: use the files, or
  EleutherAI/wikitext_document_level with an article in ``page``.
- ``lines`` has a text per line. An empty line is an error.

Sources: Eldan and Li, "TinyStories", arXiv 2305.07759; Merity et al., "Pointer Sentinel Mixture Models", arXiv
1609.07843.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tensorpeft.tasks.records import Record, read_json, read_lines, read_text
from tensorpeft.tasks.task import Question, QuestionTask

_SEPARATOR = "<|endoftext|>"
_TITLE = re.compile(r" ?= (?!=).*[^= ] = ?")


def read_stories(path: Path) -> Iterator[Record]:
    """The stories of a file that separates them by "<|endoftext|>"; rows of JSON as they are.

    Raises:
        ValueError: the file has no separator, or nothing stands between two of them.
    """
    if _holds_json(path):
        yield from read_json(path)
        return
    pieces = read_text(path).replace("\r\n", "\n").split(_SEPARATOR)
    if len(pieces) == 1:
        raise ValueError(
            f"{path}: no {_SEPARATOR} in it, expected one after each story. Use the task 'lines' for text."
        )
    if not pieces[-1].strip():
        pieces.pop()
    line = 1
    for piece in pieces:
        story = piece.strip()
        start = line + (piece[: piece.index(story)].count("\n") if story else 0)
        if not story:
            raise ValueError(
                f"{path}, line {start}: no story before {_SEPARATOR}, expected a text. Remove one of them."
            )
        yield Record({"text": story}, f"{path}, line {start}")
        line += piece.count("\n")


def read_articles(path: Path) -> Iterator[Record]:
    """The articles of a WikiText file, each with its title line; rows of JSON as they are.

    Raises:
        ValueError: text stands before the first title, or there is no title.
    """
    if _holds_json(path):
        yield from read_json(path)
        return
    lines = [line for _, line in read_lines(path)]
    titles = [number for number in range(len(lines)) if _is_title(lines, number)]
    first = titles[0] if titles else len(lines)
    stray = next((number for number in range(first) if lines[number].strip()), None if titles else 0)
    if stray is not None:
        raise ValueError(
            f"{path}, line {stray + 1}: got {lines[stray][:60]!r}, expected a title such as ' = Title = ' with an "
            "empty line before and after it. Use a file of WikiText as published, or the task 'lines'."
        )
    for start, end in zip(titles, [*titles[1:], len(lines)], strict=True):
        yield Record({"text": "\n".join(lines[start:end]).rstrip()}, f"{path}, line {start + 1}")


def read_text_lines(path: Path) -> Iterator[Record]:
    """The lines of a file, a text each; rows of JSON as they are."""
    if _holds_json(path):
        yield from read_json(path)
        return
    for place, line in read_lines(path):
        yield Record({"text": line}, place)


def parse_text(record: Record) -> tuple[Question]:
    """The text of a row, as a response to nothing.

    Raises:
        ValueError: the field ``text`` is missing, empty or no text.
    """
    return (Question(prompt="", response=record.text("text"), key=record.place),)


def parse_article(record: Record) -> tuple[Question]:
    """The article in the field ``text``, or ``page``, of a row, as a response to nothing.

    Raises:
        ValueError: there is no such field, it is empty, or a ``text`` does not begin with a title.
    """
    if record.has("page"):
        return (Question(prompt="", response=record.text("page"), key=record.place),)
    text = record.text("text", may_be_empty=True)
    if not _TITLE.fullmatch(text.lstrip("\n").split("\n")[0]):
        raise record.error(
            "text",
            "an article that begins with a line such as ' = Title = ' (where the Hub has a row per line, use "
            "EleutherAI/wikitext_document_level instead, or the published file)",
        )
    return (Question(prompt="", response=text, key=record.place),)


def _is_title(lines: Sequence[str], number: int) -> bool:
    # The empty lines matter: a formula on a line of its own can look like a title.
    around = [*lines[max(number - 1, 0) : number], *lines[number + 1 : number + 2]]
    return _TITLE.fullmatch(lines[number]) is not None and not any(line.strip() for line in around)


def _holds_json(path: Path) -> bool:
    names = [suffix for suffix in path.suffixes if suffix not in (".gz", ".bz2")]
    return names[-1:] in ([".json"], [".jsonl"])


TASKS = (
    QuestionTask(
        name="stories",
        description="TinyStories: short stories in simple words, learned as plain text.",
        read=read_stories,
        parse=parse_text,
    ),
    QuestionTask(
        name="wikitext",
        description="WikiText: articles of Wikipedia, learned as plain text.",
        read=read_articles,
        parse=parse_article,
    ),
    QuestionTask(
        name="lines",
        description="Texts, one per line of a file, learned as plain text.",
        read=read_text_lines,
        parse=parse_text,
    ),
)
