"""A person's file of texts."""

from itertools import islice
from pathlib import Path


def first_lines(
    file: Path,  # UTF-8
    most: int,
) -> list[str]:
    """The first lines with something in them. Only a line feed ends one: JSON may have other separators as they are."""
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        return [line.rstrip("\r\n") for line in islice(filter(str.strip, lines), most)]
