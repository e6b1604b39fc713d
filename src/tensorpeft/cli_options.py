"""Options that several commands share: which layers, and the network at each. Imports nothing heavy."""

import argparse
import re


def add_network(parser: argparse.ArgumentParser) -> None:
    """The options that make a DotaConfig with one largest bond."""
    parser.add_argument("--r", type=int, default=16, metavar="R", help="largest bond dimension (default: %(default)s)")
    parser.add_argument("--num-cores", type=int, default=5, metavar="N", help="cores (default: %(default)s)")
    add_targets(parser)


def add_double_quant(parser: argparse.ArgumentParser) -> None:
    """Of the commands that quantise."""
    parser.add_argument("--no-double-quant", action="store_true", help="keep the blocks' scales in 32 bits")


def add_targets(parser: argparse.ArgumentParser) -> None:
    """Which layers."""
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="endings of layers' names, one regular expression, or all-linear (default: PEFT's for the architecture)",
    )


def targets_of(arguments: argparse.Namespace) -> list[str] | str | None:
    """What `target_modules` takes."""
    targets = arguments.target_modules
    if targets and len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        return targets[0]  # a regular expression, or all-linear
    return targets


def network_of(arguments: argparse.Namespace):  # -> DotaConfig
    """The configuration that `add_network`'s options make."""
    from tensorpeft import DotaConfig

    return DotaConfig(r=arguments.r, num_cores=arguments.num_cores, target_modules=targets_of(arguments))
