"""Tables as data, and as Markdown."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Sequences that a terminal obeys (CSI, OSC), and what is left of control characters but for tab and newline.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Larger numbers, of perplexities, are written in powers of ten.
_LARGEST_FIXED = 1e5


class Table(NamedTuple):
    """A table before it is drawn. Every text in it is data: labels, paths and names are never read as markup.

    Args:
        title: a line above it.
        headers: one per column; newlines stand where a terminal breaks them.
        rows: as many cells as headers. The first column is text, the others are numbers.
        notes: what a reader must know, a line each, below it.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def strip_controls(text: str) -> str:
    """The text without what moves a terminal's cursor, colours it or sets its title; tabs and newlines stay."""
    return _CONTROL.sub("", text)


def one_line(text: str) -> str:
    """The text without control characters, on one line."""
    return " ".join(strip_controls(text).split())


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a cell is one line, and a bar in it is no border."""
    lines = [[one_line(cell).replace("|", r"\|") for cell in line] for line in (headers, *rows)]
    lines.insert(1, ["---"] * len(headers))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_list(lines: Sequence[str]) -> str:
    """A Markdown list of texts of one line."""
    return "\n".join(f"- {one_line(line)}" for line in lines)


def markdown_tables(tables: Sequence[Table]) -> str:
    """A Markdown document of tables with their titles and notes."""
    parts = [(f"## {t.title}", markdown_table(t.headers, t.rows), markdown_list(t.notes)) for t in tables]
    return "\n\n".join(part for section in parts for part in section if part)


def markdown_document(
    title: str,
    description: str,
    command: str,  # that made it; "": not known
    sections: Sequence[str],  # empty ones are left out
    recipe: str,  # in YAML
    versions: Mapping[str, str],
) -> str:
    """A Markdown document of what was done, the sections, and what one needs to get it again."""
    listed = markdown_list([f"{name} {version}" for name, version in versions.items()])
    first = [f"# {one_line(title)}", description.strip(), f"    {command}" if command else ""]
    last = ["## Recipe", f"```yaml\n{recipe.rstrip()}\n```", "## Versions", listed]
    return "\n\n".join(section for section in (*first, *sections, *last) if section)


def model_title(model: str) -> str:
    """What a title calls the model of a folder or Hub name: the last two parts, which a Hub name has."""
    return "/".join(Path(model).parts[-2:])


def format_number(value: float) -> str:
    """Four decimals, or four digits of a number that would be long."""
    return f"{value:.4f}" if abs(value) < _LARGEST_FIXED else f"{value:.4g}"


def mean_and_sd(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± sample standard deviation of the finite values, and how many are none; without any values, a dash.

    Of one value, that; of none that is finite, "diverged".
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "diverged" if values else "–"
    mean = f"{statistics.fmean(finite):.{digits}f}"
    shown = mean if len(finite) == 1 else f"{mean} ± {spread(finite):.{digits}f}"
    diverged = len(values) - len(finite)
    return f"{shown} ({diverged} of {len(values)} diverged)" if diverged else shown


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
