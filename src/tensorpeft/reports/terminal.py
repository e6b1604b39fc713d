"""What a person sees in a terminal. Texts are printed as they are: square brackets in them are no markup."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box, progress
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from tensorpeft.reports.tables import Table, one_line, strip_controls

# A longer label is folded: a table of numbers should not be as wide as a path.
_LABEL_WIDTH = 60


def plain(text: str) -> Text:
    """What rich draws as it stands, but for control characters, which are left out."""
    return Text(strip_controls(text))


def say(console: Console, text: str) -> None:
    """Print a text; the terminal wraps its lines, so that a path can be copied whole."""
    console.print(plain(text), soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Print title, table and notes. Numbers are never cut: lines may be wider than a narrow terminal, or a pipe."""
    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, header in enumerate(table.headers):
        if index == 0:
            drawn.add_column(plain(header), overflow="fold", max_width=_LABEL_WIDTH)
        else:
            drawn.add_column(plain(header), justify="right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*map(plain, row))
    if (natural := _natural_width(console, drawn)) > console.width:
        drawn.padding = 0  # one space between columns, not two
        natural = _natural_width(console, drawn)
    # Not the table's own title and caption, which would be as narrow as its columns.
    say(console, table.title)
    Console(file=console.file, quiet=console.quiet, width=max(console.width, natural)).print(drawn)
    for note in table.notes:
        console.print(plain(note))


def _natural_width(console: Console, drawn: RichTable) -> int:
    return console.measure(drawn, options=console.options.update(width=10_000)).maximum


class _Description(progress.ProgressColumn):
    """What is done, in a fixed width: bars that move sideways cannot be read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def render(self, task: progress.Task) -> Text:
        return Text(f"{one_line(task.description)[: self._width]:<{self._width}}")


def make_progress(
    console: Console,
    width: int = 28,  # of the description, in columns; a longer one is cut
) -> progress.Progress:
    """Bars with a description, m/n, the time that has passed and the time that is left."""
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    bar = progress.BarColumn(bar_width=12)
    return progress.Progress(_Description(width), bar, progress.MofNCompleteColumn(), *times, console=console)


@contextmanager
def counting(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over things that are counted, as what is to be called with (done, total)."""
    with make_progress(console) as bars:
        bar = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
