"""Rows of published files: read one by one, each knowing where it stands, so that a bad one can be named.

A row is never skipped. What is missing, empty or of the wrong type is a `ValueError` with file, line and field.
"""

import bz2
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}


@dataclass(frozen=True)
class Record:
    """One row as published.

    Args:
        fields: value by field name.
        place: where it stands, such as "dev.tsv, line 7", for errors.
    """

    fields: Mapping[str, Any]
    place: str

    def text(self, field: str, may_be_empty: bool = False) -> str:
        """The text of a field, as it stands.

        Raises:
            ValueError: the field is missing, is no text, is blank, or cannot be written as UTF-8.
        """
        value = self._value(field)
        if not isinstance(value, str):
            raise self.error(field, "a text")
        if not may_be_empty and not value.strip():
            raise self.error(field, "a text that is not empty")
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON may escape half of a surrogate pair, which no tokenizer takes
            raise self.error(field, "a text of whole characters, not half of a surrogate pair") from None
        return value

    def number(self, field: str) -> float:
        """The number of a field, which may be written as a text, as in TSV files. True and False are no numbers.

        Raises:
            ValueError: the field is missing or no finite number.
        """
        value = self._value(field)
        if isinstance(value, bool):
            raise self.error(field, "a number")
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError):
            raise self.error(field, "a number") from None
        if number - number != 0:  # infinite, or not a number
            raise self.error(field, "a finite number")
        return number

    def choice(self, field: str, choices: Mapping[Any, Any]) -> Any:
        """What ``choices`` has for the field's value. 1, "1" and True are different values.

        Raises:
            ValueError: the field is missing, or its value is none of the choices.
        """
        value = self._value(field)
        for key, meaning in choices.items():
            if type(key) is type(value) and key == value:
                return meaning
        raise self.error(field, "one of " + ", ".join(repr(key) for key in choices))

    def items(self, field: str) -> list[Any]:
        """The list of a field, which may not be empty.

        Raises:
            ValueError: the field is missing, is no list, or is empty.
        """
        value = self._value(field)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise self.error(field, "a list that is not empty")
        return list(value)

    def record(self, field: str) -> "Record":
        """The mapping of a field as a row of its own."""
        return self.part(self._value(field), field)

    def records(self, field: str) -> list["Record"]:
        """The mappings in the list of a field as rows of their own."""
        return [self.part(item, f"{field}[{number}]") for number, item in enumerate(self.items(field))]

    def part(self, value: Any, name: str) -> "Record":
        """A value within this row as a row of its own.

        Raises:
            ValueError: it is no mapping.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.place}, field {name!r}: got {_short(value)}, expected an object with fields.")
        return Record(value, f"{self.place}, in {name!r}")

    def has(self, *fields: str) -> bool:
        """Whether the row has all of these fields."""
        return all(field in self.fields for field in fields)

    def error(self, field: str, expected: str) -> ValueError:
        """What to raise about a field: what it holds, what was expected, what to do."""
        got = _short(self.fields[field]) if field in self.fields else "nothing"
        return ValueError(
            f"{self.place}, field {field!r}: got {got}, expected {expected}. Correct or remove the row; "
            f"its fields are {', '.join(map(str, self.fields))}."
        )

    def _value(self, field: str) -> Any:
        if field not in self.fields:
            raise self.error(field, "this field")
        return self.fields[field]


def read_text(
    path: Path,  # plain, .gz or .bz2
) -> str:
    """The whole text of a UTF-8 file, without a byte order mark at its beginning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decompressed, or is no UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}. Pass the path of a published file of this task (a recipe: data.train=FILE). Small "
            "versions and studies of the package read theirs from the folder that the variable TENSORPEFT_DATA names."
        )
    try:
        with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}). Fetch the file again.") from None


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The (place, line) of every line; only a line feed ends a line, a carriage return before it is dropped."""
    # Not splitlines(): it would cut at characters that are text in these files.
    lines = read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        yield f"{path}, line {number}", line.removesuffix("\r")


def read_json_lines(path: Path) -> Iterator[Record]:
    """The rows of a file with one JSON object per line; an empty line is an error, not a row."""
    for place, line in read_lines(path):
        try:
            fields = json.loads(line)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{place}: not JSON ({_reason(error)}). Expected one object per line.") from None
        yield _as_record(fields, place)


def read_json_list(path: Path) -> Iterator[Record]:
    """The rows of a file that is one JSON list of objects."""
    text, decoder, position, line = read_text(path), json.JSONDecoder(), 0, 1
    expected = "["
    while True:
        # Element by element, because the whole list at once would not know its lines.
        start = position
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        line += text.count("\n", start, position)
        found = text[position : position + 1]
        if found not in expected or not found:
            raise ValueError(f"{path}, line {line}: got {found!r}, expected {' or '.join(expected)} of a JSON list.")
        position += 1
        if found == "]":
            break
        start = position
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        line += text.count("\n", start, position)
        if found == "[" and text[position : position + 1] == "]":
            position += 1
            break
        try:
            fields, end = decoder.raw_decode(text, position)
        except (RecursionError, ValueError) as error:
            raise _not_json(error, path, line) from None
        yield _as_record(fields, f"{path}, line {line}")
        line += text.count("\n", position, end)
        position, expected = end, ",]"
    if rest := text[position:].lstrip():
        line += text.count("\n", position, len(text) - len(rest))
        raise ValueError(f"{path}, line {line}: got {_short(rest)} after the end of the JSON list, expected nothing.")


def read_json_object(path: Path) -> Record:
    """The whole of a file that is one JSON object."""
    text = read_text(path)
    try:
        fields = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise _not_json(error, path, line=1) from None
    return _as_record(fields, str(path))


def read_json(path: Path) -> Iterator[Record]:
    """The rows of a JSON list (.json) or of JSON lines (.jsonl), compressed or not."""
    names = [suffix for suffix in path.suffixes if suffix not in _OPEN]
    if names[-1:] not in ([".json"], [".jsonl"]):
        raise ValueError(f"{path}: expected a file that ends in .json or .jsonl, perhaps with .gz or .bz2 after it.")
    return read_json_list(path) if names[-1] == ".json" else read_json_lines(path)


def read_tsv(
    path: Path,
    columns: Sequence[str] | None = None,  # of a file without a header; None: the first line names them
) -> Iterator[Record]:
    """The rows of a file with tab-separated fields. Quotation marks are text."""
    lines = read_lines(path)
    if columns is None:
        place, header = next(lines)
        columns = header.split("\t")
        if len(set(columns)) < len(columns) or not header:
            raise ValueError(f"{place}: got {_short(header)}, expected a different name for each column.")
    for place, line in lines:
        fields = line.split("\t")
        if len(fields) != len(columns):
            raise ValueError(
                f"{place}: {len(fields)} fields, expected {len(columns)} separated by tabs ({', '.join(columns)}). "
                "Correct or remove the line."
            )
        yield Record(dict(zip(columns, fields, strict=True)), place)


def _as_record(fields: Any, place: str) -> Record:
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: got {_short(fields)}, expected an object with fields.")
    return Record(fields, place)


def _not_json(error: Exception, path: Path, line: int) -> ValueError:
    return ValueError(f"{path}, line {getattr(error, 'lineno', line)}: not JSON ({_reason(error)}).")


def _reason(error: Exception) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
