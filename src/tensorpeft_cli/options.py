"""The parser of the command, what its options are checked with, and the options that several commands share."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tensorpeft_cli.package import read_plain

DTYPES = ("bfloat16", "float16", "float32")
# For the help: all that a model may be called.
MODEL = "folder, GGUF file, package:NAME or Hub name of a model"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions: the command tells all of its errors in one place and one form."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, exit_on_error=False)

    def error(self, message: str) -> NoReturn:
        """Raise what `exit_on_error` leaves to this function."""
        raise argparse.ArgumentError(None, message)


def whole(at_least: int, at_most: int = 2**31 - 1) -> Callable[[str], int]:
    """What argparse takes as `type`: a whole number that is large enough, and none that no machine could do."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < at_least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least {at_least}.")
        if int(text) > at_most:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at most {at_most}.")
        return int(text)

    return parse


def number(text: str) -> float:
    """What argparse takes as `type`: a number, of any sign."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a number, such as 0.1.")
    return value


def positive(text: str) -> float:
    """What argparse takes as `type`: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, such as 0.1.")
    return value


def existing(text: str) -> Path:
    """What argparse takes as `type`: a file or folder that is there."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder.")
    return Path(text)


def model_name(text: str) -> str:
    """What argparse takes as `type`: a model's folder, GGUF file or name. A path to nothing is no name of the Hub's."""
    is_path = text.startswith(("/", "./", "../", "~")) or text.endswith(".gguf") or text.count("/") > 1
    if is_path and not text.startswith("package:") and not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"{text}: no such file or folder. Pass the folder or GGUF file of a model, or its name on the Hub."
        )
    return text


def method_keys(text: str) -> str:
    """What argparse takes as `type`: different names with commas between them."""
    keys = [key.strip() for key in text.split(",")]
    if not all(keys) or len(set(keys)) < len(keys):
        raise argparse.ArgumentTypeError(f"{text}: expected different names, with commas between: dota,lora.")
    return ",".join(keys)


def find_recipe(name: str) -> Path:
    """The file of a recipe, by path or by name; FileNotFoundError where there is none."""
    return read_plain("recipes/__init__.py")["find_recipe"](name)


def read_catalogue() -> dict[str, Any]:
    """The names that the catalogue of methods defines."""
    return read_plain("studies/catalogue.py")


def known_methods() -> list[str]:
    """The keys of all methods in the catalogue."""
    return [method.key for method in read_catalogue()["METHODS"]]


def parse_budget(text: str | None) -> int | None:
    """The number of parameters that an option ``--budget`` says, such as 1M."""
    return None if text is None else read_plain("studies/budget.py")["parse_count"](text)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe, and what is put on it."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `tensorpeft recipes` lists")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=(),
        metavar="KEY=VALUE",
        help="of the recipe, such as trainer.learning_rate=1e-3 seeds=[0,1]",
    )
    parser.add_argument("--smoke", action="store_true", help="the recipe's small version: shows that it runs, no more")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Of the commands that take a model."""
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where models that were made from GGUF files are kept (default: $TENSORPEFT_CACHE, or the user's cache)",
    )


def add_network(parser: argparse.ArgumentParser) -> None:
    """The options that make a DotaConfig with one largest bond."""
    parser.add_argument(
        "--r", type=whole(1), default=16, metavar="R", help="largest bond dimension (default: %(default)s)"
    )
    parser.add_argument(
        "--num-cores", type=whole(2, at_most=1000), default=5, metavar="N", help="cores (default: %(default)s)"
    )
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
