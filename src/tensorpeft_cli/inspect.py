"""``tensorpeft inspect``: its views and their options."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tensorpeft_cli.options import (
    MODEL,
    add_cache,
    add_double_quant,
    add_network,
    add_recipe,
    existing,
    find_recipe,
    model_name,
    network_of,
    parse_budget,
    whole,
)
from tensorpeft_cli.package import import_package

HELP = "look into a model's weights, or its gradients, before an adapter is trained"
_VIEWS = ("bonds", "quantization", "update")


def with_view(argv: Sequence[str]) -> list[str]:
    """The words of a command line, `inspect MODEL` being `inspect bonds MODEL`."""
    if list(argv[:1]) == ["inspect"] and len(argv) > 1 and argv[1] not in (*_VIEWS, "-h", "--help"):
        return ["inspect", "bonds", *argv[1:]]
    return list(argv)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The views, each with its options."""
    parser.description = (
        "`tensorpeft inspect MODEL` is `tensorpeft inspect bonds MODEL`; a folder called like a view is ./bonds."
    )
    views = parser.add_subparsers(title="views", required=True, metavar="[VIEW] MODEL")
    bonds = views.add_parser(
        "bonds",
        help="spectra, truncation errors at several bonds, and the bonds that lose least (without a view: this one)",
        description="How much of every weight a matrix product operator keeps, where it loses most, and the bonds that "
        'lose least for a number of parameters, as DotaConfig(r="auto", bonds=...) takes them; tables, figures, JSON.',
    )
    _add_model(bonds)
    bonds.add_argument("--budget", metavar="N", help="of the adaptive bonds, such as 50k (default: bond R's size)")
    bonds.add_argument(
        "--weighted", action="store_true", help="weigh each weight's error by its inputs' mean square on text"
    )
    _add_output(bonds, "runs/inspect")
    bonds.set_defaults(run=_bonds)
    errors = views.add_parser(
        "quantization",
        help="what 4 bits cost each layer with QLoRA, QPiSSA and QDoTA",
        description="Relative errors of every layer's 4-bit weight and of its output on text; a table, a plot, JSON.",
    )
    _add_model(errors)
    add_double_quant(errors)
    errors.add_argument(
        "--rounds", type=whole(1), default=5, metavar="K", help="beside one shot (default: %(default)s)"
    )
    _add_output(errors, "runs/quantization")
    errors.set_defaults(run=_quantization)
    update = views.add_parser(
        "update",
        help="how much of the gradient, and of a full update, each method could reach, on a recipe's data",
        description="Shares of the energy of a gradient on other rows, and of what some steps of full fine-tuning "
        "change, that lie where each method can move; tables, JSON.",
    )
    add_recipe(update)
    update.add_argument(
        "--rows", type=whole(1), default=32, metavar="N", help="of each of the two gradients (default: %(default)s)"
    )
    update.add_argument(
        "--steps",
        type=whole(0),
        default=48,
        metavar="N",
        help="of full fine-tuning; 0: gradients alone (default: %(default)s)",
    )
    update.add_argument(
        "--layers", type=whole(1), default=5, metavar="N", help="weights of each kind (default: %(default)s)"
    )
    for name, default, text in (
        ("--bond", 16, "R of the matrix product operators and the train"),
        ("--frames", 8, "rank of frames per weight"),
        ("--shared-frames", 16, "rank of frames that all weights of a kind share, and of CP"),
    ):
        update.add_argument(name, type=whole(1), default=default, metavar="R", help=f"{text} (default: %(default)s)")
    update.add_argument(
        "--output", type=Path, default=Path("runs/update"), metavar="DIR", help="(default: %(default)s)"
    )
    add_cache(update)
    update.set_defaults(run=_update)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model_name, metavar="MODEL", help=f"{MODEL} in 16 or 32 bits")
    add_network(parser)


def _add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--text", type=existing, metavar="FILE", help="a text per line (default: Python's own docstrings)"
    )
    parser.add_argument("--output", type=Path, default=Path(default), metavar="DIR", help="(default: %(default)s)")
    add_cache(parser)


def _bonds(arguments: argparse.Namespace, command: str) -> None:
    budget = parse_budget(arguments.budget)
    if arguments.text is not None and not arguments.weighted:
        raise ValueError(f"--text {arguments.text}: only weights by activations need a text. Add --weighted.")
    import_package()
    from tensorpeft.studies.bonds_report import inspect_bonds

    inspect_bonds(arguments.model, network_of(arguments), arguments.output, budget, arguments.weighted, arguments.text)


def _quantization(arguments: argparse.Namespace, command: str) -> None:
    import_package()
    from tensorpeft.studies.quantization_report import inspect_quantization

    inspect_quantization(
        arguments.model,
        network_of(arguments),
        arguments.rounds,
        arguments.output,
        arguments.text,
        not arguments.no_double_quant,
    )


def _update(arguments: argparse.Namespace, command: str) -> None:
    find_recipe(arguments.recipe)
    import_package()
    from tensorpeft.studies.update import Sizes
    from tensorpeft.studies.update_report import inspect_update
    from tensorpeft.training.recipe import load_recipe

    sizes = Sizes(bond=arguments.bond, frames=arguments.frames, shared_frames=arguments.shared_frames)
    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.smoke)
    inspect_update(recipe, arguments.rows, arguments.steps, arguments.layers, sizes, arguments.output)
