"""Tables for a terminal and for Markdown."""

from collections.abc import Sequence

TABLE_WIDTH = 100


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the parts of a header that a terminal puts on several lines stand on one."""
    headers = [" ".join(header.split()) for header in headers]
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
