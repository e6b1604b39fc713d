"""``tensorpeft recipes``: the recipes of the package, and the text of one."""

import argparse
import re
import textwrap
from itertools import groupby
from pathlib import Path

from tensorpeft_cli.options import find_recipe
from tensorpeft_cli.package import read_plain

HELP = "list the recipes of this package, or print one"
_WIDTH = 100


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = "List the recipes of this package, or print one: tensorpeft recipes demo > my.yaml"
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the recipe to print (default: list all)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, command: str) -> None:
    if arguments.name is not None:
        print(_from_anywhere(find_recipe(arguments.name)), end="")
        return
    names: list[str] = read_plain("recipes/__init__.py")["list_names"]()
    margin = max(map(len, names)) + 2
    for _, group in groupby(sorted(names, key=_folder), key=_folder):
        for name in group:
            text = textwrap.wrap(_first_sentence(find_recipe(name)), _WIDTH - margin) or [""]
            print(f"{name:{margin}}{text[0]}".rstrip(), *(" " * margin + line for line in text[1:]), sep="\n")
        print()
    print(
        "Run one:       tensorpeft train small/minilm_docstrings --smoke\n"
        "Compare on it: tensorpeft compare small/minilm_docstrings --methods lora,dota\n"
        "Make it yours: tensorpeft recipes small/minilm_docstrings > my.yaml"
    )


def _from_anywhere(path: Path) -> str:
    """The text of a recipe; what a packaged one inherits from a file beside it, by that one's packaged name."""
    folder: Path = read_plain("recipes/__init__.py")["FOLDER"]

    def named(line: re.Match[str]) -> str:
        parent = (path.parent / line[1]).resolve()
        return f"inherits: {parent.relative_to(folder.resolve()).with_suffix('').as_posix()}"

    text = path.read_text(encoding="utf-8")
    is_packaged = folder.resolve() in path.resolve().parents
    return re.sub(r"(?m)^inherits: (\S+\.yaml)$", named, text) if is_packaged else text


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _first_sentence(path: Path) -> str:
    """Of what a recipe says of itself; in files of others' form a comment says it, in their first line."""
    import yaml

    text = path.read_text(encoding="utf-8")
    description = yaml.safe_load(text).get("description") or text.partition("\n")[0].removeprefix("# ")
    return re.split(r"(?<=[.?!]) ", " ".join(description.split()))[0]
