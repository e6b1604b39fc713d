"""What a person named is shown as it is: in a terminal, in Markdown, in a bar and in a figure."""

import io
import math

import pytest

pytest.importorskip("rich")
from rich.console import Console

from tensorpeft.reports.tables import Table, format_number, markdown_list, markdown_table, markdown_tables, mean_and_sd
from tensorpeft.reports.terminal import counting, make_progress, plain, print_table, say

LABEL = "[/bold] a|b \x1b[31m"
SHOWN = "[/bold] a|b "


def terminal(width: int = 80, **more) -> Console:
    return Console(file=io.StringIO(), width=width, **more)


def printed(console: Console) -> str:
    return console.file.getvalue()


@pytest.mark.parametrize("force_terminal", [False, True])
def test_a_table_shows_every_text_as_it_is(force_terminal):
    console = terminal(force_terminal=force_terminal, no_color=True)
    table = Table(f"title {LABEL}", [f"header {LABEL}", "[red]x"], [[f"row {LABEL}", f"1 {LABEL}"]], [f"note {LABEL}"])
    print_table(console, table)
    for place in ("title", "header", "row", "1", "note"):
        assert f"{place} {SHOWN}".rstrip() in printed(console)
    assert "[red]x" in printed(console)
    assert "\x1b[31m" not in printed(console)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (LABEL, SHOWN),
        ("\x1b]0;title\x07name\x1b]8;;http://x\x1b\\", "name"),
        ("\x9b31mred\r\x08\x00", "31mred"),
        ("\x1b(0é\tü\n東京 – ± ρ", "(0é\tü\n東京 – ± ρ"),
    ],
)
def test_control_characters_are_left_out_and_nothing_else(text, shown):
    assert plain(text).plain == shown


def test_a_path_is_printed_on_one_line_whatever_is_in_it():
    console = terminal(width=20)
    path = "/runs/[/bold]/[bold red]/" + "long" * 20
    say(console, f"Report: {path}")
    assert printed(console) == f"Report: {path}\n"


def test_numbers_are_never_cut_and_a_long_label_is_folded():
    console = terminal(width=30)
    numbers = [f"{k}.123456 ± 0.1" for k in range(9)]
    print_table(console, Table("title", ["label", *map(str, range(9))], [["x" * 100, *numbers]], ["word " * 20]))
    lines = printed(console).splitlines()
    assert all(any(number in line for line in lines) for number in numbers)
    assert "…" not in printed(console)
    assert sum(line.count("x") for line in lines) == 100
    assert max(line.count("x") for line in lines) < 100
    assert all(len(line) <= 30 for line in lines if "word" in line)


def test_a_quiet_console_prints_no_table():
    console = terminal(quiet=True)
    print_table(console, Table("title", ["a"], [["b"]], ["note"]))
    assert printed(console) == ""


def test_a_cell_of_markdown_is_one_line_between_two_bars():
    text = markdown_table(["two\nlines", "b"], [[LABEL, "1\n2"]])
    assert text == "| two lines | b |\n| --- | --- |\n| [/bold] a\\|b | 1 2 |"
    assert markdown_list(["one\ntwo", LABEL]) == "- one two\n- [/bold] a|b"
    assert markdown_tables([Table("T", ["a"], [["b"]], ["c"]), Table("U", ["d"], [])]) == (
        "## T\n\n| a |\n| --- |\n| b |\n\n- c\n\n## U\n\n| d |\n| --- |"
    )


def test_a_bar_shows_its_description_as_it_is():
    console = terminal(force_terminal=True, no_color=True)
    with make_progress(console) as progress:
        progress.add_task(LABEL, total=3, completed=1)
    assert f"{SHOWN:<28}" in printed(console)
    assert "1/3" in printed(console)
    assert "\x1b[31m" not in printed(console)
    with counting(console, "weights") as count:
        count(2, 5)
    assert "2/5" in printed(console)


def test_the_spread_is_the_sample_s_and_only_finite_values_count():
    assert mean_and_sd([1.0, 2.0]) == "1.500 ± 0.707"
    assert mean_and_sd([1.0, 2.0, math.inf]) == "1.500 ± 0.707 (1 of 3 diverged)"
    assert mean_and_sd([math.nan, 2.0, math.inf]) == "2.000 (2 of 3 diverged)"
    assert mean_and_sd([0.25], 4) == "0.2500"
    assert mean_and_sd([math.inf, math.nan]) == "diverged"
    assert mean_and_sd([]) == "–"
    assert [format_number(value) for value in (1.5, 123456789.0)] == ["1.5000", "1.235e+08"]
