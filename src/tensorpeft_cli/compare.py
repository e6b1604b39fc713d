"""``tensorpeft compare``."""

import argparse
from pathlib import Path

from tensorpeft_cli.options import (
    add_cache,
    add_recipe,
    find_recipe,
    known_methods,
    method_keys,
    number,
    parse_budget,
    read_catalogue,
    whole,
)
from tensorpeft_cli.package import import_package

HELP = "several methods on one recipe: the same data, model and number of steps, each at a learning rate of its own"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Run a recipe with several methods and seeds; print a table, write a report (HTML), plots and raw results. "
        "Called again, it goes on: finished cells are not run again."
    )
    add_recipe(parser)
    defaults = read_catalogue()["DEFAULT_COMPARED"]
    others = [key for key in known_methods() if key not in defaults]
    parser.add_argument(
        "--methods",
        type=method_keys,
        metavar="A,B",
        help=f"of the recipe's, or {', '.join(defaults)} (these by default), {', '.join(others)}",
    )
    parser.add_argument(
        "--seeds", type=whole(1, at_most=1000), metavar="N", help="final runs per method (default: the recipe's, or 3)"
    )
    parser.add_argument("--budget", metavar="N", help="equal size: ranks that come closest to it, such as 50k")
    parser.add_argument(
        "--target-loss", type=number, metavar="L", help="for the time to a loss (default: all reach it)"
    )
    parser.add_argument(
        "--timing-rounds",
        type=whole(0),
        default=7,
        metavar="N",
        help="timed steps; 0: time nothing (default: %(default)s)",
    )
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--workers", type=whole(1, at_most=1000), metavar="N", help="processes to run in, a GPU or some cores each"
    )
    places.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on a Ray cluster; without ADDRESS: the one here, or a new one",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="(default: the recipe's, or runs/compare/RECIPE; with --smoke, one beside it)",
    )
    add_cache(parser)
    parser.set_defaults(run=_run, extra="train")


def _run(arguments: argparse.Namespace, command: str) -> int:
    find_recipe(arguments.recipe)
    ray, overrides = arguments.ray, arguments.overrides
    if ray and "=" in ray:  # no address: KEY=VALUE behind a --ray without one
        ray, overrides = "", [*overrides, ray]
    budget = parse_budget(arguments.budget)
    import_package()
    from tensorpeft.studies.compare.entries import load_entries
    from tensorpeft.studies.compare.run import run_compare

    comparison = load_entries(
        arguments.recipe,
        arguments.methods,
        arguments.seeds,
        overrides,
        arguments.smoke,
        arguments.output,
        budget,
        arguments.target_loss,
    )
    results = run_compare(comparison, arguments.timing_rounds, command, workers=arguments.workers, ray=ray)
    return int(any(result.has_failed for result in results))
