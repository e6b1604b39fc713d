"""``tensorpeft inspect``: its views and their options."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tensorpeft.cli_options import add_double_quant, add_network, network_of

_VIEWS = ("bonds", "quantization")
_MODEL = "folder or Hub name of a checkpoint in 16 or 32 bits"


def with_view(argv: Sequence[str]) -> list[str]:
    """The words of a command line, `inspect MODEL` being `inspect bonds MODEL`."""
    if list(argv[:1]) == ["inspect"] and len(argv) > 1 and argv[1] not in (*_VIEWS, "-h", "--help"):
        return ["inspect", "bonds", *argv[1:]]
    return list(argv)


def add_inspect(commands) -> None:  # commands: what add_subparsers returns
    """Add the command and its views."""
    inspect = commands.add_parser(
        "inspect",
        help="look into a model's weights before an adapter is trained",
        description="`tensorpeft inspect MODEL` is `tensorpeft inspect bonds MODEL`; a folder that is called like a "
        "view is ./bonds.",
    )
    views = inspect.add_subparsers(title="views", required=True, metavar="VIEW")
    bonds = views.add_parser(
        "bonds",
        help="spectra, truncation errors at several bonds, and the bonds that lose least (without a view: this one)",
        description="How much of every weight a matrix product operator keeps, where it loses most, and the bonds that "
        'lose least for a number of parameters, as DotaConfig(r="auto", bonds=...) takes them; tables, figures, JSON.',
    )
    bonds.add_argument("model", metavar="MODEL", help=_MODEL)
    add_network(bonds)
    bonds.add_argument("--budget", metavar="N", help="of the adaptive bonds, such as 50k (default: bond R's size)")
    bonds.add_argument(
        "--weighted", action="store_true", help="weigh each weight's error by its inputs' mean square on text"
    )
    bonds.add_argument("--text", type=Path, metavar="FILE", help="a text per line (default: Python's own docstrings)")
    bonds.add_argument(
        "--output", type=Path, default=Path("runs/inspect"), metavar="DIR", help="(default: %(default)s)"
    )
    bonds.set_defaults(run=_inspect_bonds)
    errors = views.add_parser(
        "quantization",
        help="what 4 bits cost each layer with QLoRA, QPiSSA and QDoTA",
        description="Relative errors of every layer's 4-bit weight and of its output on text; a table, a plot, JSON.",
    )
    errors.add_argument("model", metavar="MODEL", help=_MODEL)
    add_network(errors)
    add_double_quant(errors)
    errors.add_argument("--rounds", type=int, default=5, metavar="K", help="beside one shot (default: %(default)s)")
    errors.add_argument("--text", type=Path, metavar="FILE", help="a text per line (default: Python's own docstrings)")
    errors.add_argument(
        "--output", type=Path, default=Path("runs/quantization"), metavar="DIR", help="(default: %(default)s)"
    )
    errors.set_defaults(run=_inspect_quantization)


def _inspect_bonds(arguments: argparse.Namespace, command: str) -> None:
    from tensorpeft.studies.bonds_report import inspect_bonds
    from tensorpeft.studies.budget import parse_count

    inspect_bonds(
        arguments.model,
        network_of(arguments),
        arguments.output,
        None if arguments.budget is None else parse_count(arguments.budget),
        arguments.weighted,
        arguments.text,
    )


def _inspect_quantization(arguments: argparse.Namespace, command: str) -> None:
    from tensorpeft.studies.quantization_report import inspect_quantization

    inspect_quantization(
        arguments.model,
        network_of(arguments),
        arguments.rounds,
        arguments.output,
        arguments.text,
        not arguments.no_double_quant,
    )
