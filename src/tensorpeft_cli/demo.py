"""``tensorpeft demo``: compare, on the packaged recipe of this name."""

import argparse
from pathlib import Path

from tensorpeft_cli.options import add_cache, known_methods, method_keys, whole
from tensorpeft_cli.package import import_package

HELP = "fine-tune a small language model with several methods on this machine, and see what each has learnt"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Fine-tune a small model with several methods; print a table, write a report, plots and raw results. It is "
        "`tensorpeft compare demo`; `tensorpeft recipes demo` prints what is done. Called again, it goes on: finished "
        "cells are not run again."
    )
    parser.add_argument(
        "--methods", type=method_keys, metavar="A,B", help=f"of the recipe's, or {', '.join(known_methods())}"
    )
    parser.add_argument("--quick", action="store_true", help="few steps, rows and seeds: shows that it runs, no more")
    parser.add_argument(
        "--seeds", type=whole(1, at_most=1000), metavar="N", help="final runs per method (default: the recipe's)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the report goes (default: runs/demo; with --quick, runs/demo-smoke)",
    )
    add_cache(parser)
    parser.set_defaults(run=_run, extra="train")


def _run(arguments: argparse.Namespace, command: str) -> int:
    import_package()
    from tensorpeft.studies.compare.entries import load_entries
    from tensorpeft.studies.compare.run import run_compare

    comparison = load_entries(
        "demo", arguments.methods, arguments.seeds, smoke=arguments.quick, output=arguments.output
    )
    results = run_compare(comparison, 1 if arguments.quick else 3, command)
    return int(any(result.has_failed for result in results))
