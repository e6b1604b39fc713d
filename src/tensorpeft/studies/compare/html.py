"""The report of a comparison as one HTML file that needs no network."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader

from tensorpeft.reports.files import write_lines
from tensorpeft.studies.compare.answers import AnsweredQuestion
from tensorpeft.studies.compare.entries import Comparison
from tensorpeft.studies.compare.results import EntryResult
from tensorpeft.studies.compare.table import detail_tables, main_table


def write_html(
    comparison: Comparison,
    results: Sequence[EntryResult],
    answers: Sequence[AnsweredQuestion],
    command: str,
    plots: Sequence[tuple[str, Path]],  # heading, PNG
    versions: dict[str, str],
    path: Path,
) -> None:
    """Write the report; pictures and style are inside, and every text is escaped."""
    loader = PackageLoader("tensorpeft.studies", "compare")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pictures = [(heading, base64.b64encode(file.read_bytes()).decode()) for heading, file in plots]
    page = environment.get_template("report.html.jinja").render(
        description=comparison.recipe.description.strip(),
        command=command,
        table=main_table(comparison, results),
        pictures=pictures,
        details=detail_tables(results, answers),
        recipe=comparison.recipe.to_yaml().rstrip(),
        adapters=[(result.entry.label, _fields(result)) for result in results],
        versions=versions,
    )
    write_lines(path, [page.rstrip()])


def _fields(result: EntryResult) -> str:
    adapter = result.entry.recipe.adapter
    if not result.entry.rates:
        return "nothing is trained"
    if adapter is None:
        return "all weights are trained"
    return ", ".join(f"{name}={value}" for name, value in adapter.items())
