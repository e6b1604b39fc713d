"""The recipes of this package, and how one is found by its name.

The standard library alone: the command reads this file before it imports anything heavy.
"""

import difflib
from pathlib import Path

FOLDER = Path(__file__).parent


def list_names() -> list[str]:
    """The names of the packaged files, such as dota/commonsense_llama2_7b."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def find_recipe(
    name: str | Path,  # a path, or the name of a packaged recipe, with .yaml or without
    beside: Path = Path(),  # the folder that a path is relative to
) -> Path:
    """The file of a recipe: the one at this path, else the packaged one of this name.

    Raises:
        FileNotFoundError: there is neither; names those that are called alike.
    """
    path, names = beside / name, list_names()
    if path.is_file():
        return path
    key = str(name).removesuffix(".yaml")
    if key in names:
        return FOLDER / f"{key}.yaml"
    alike = [*difflib.get_close_matches(key, names), *(other for other in names if Path(other).name == Path(key).name)]
    hint = f"Did you mean {' or '.join(dict.fromkeys(alike))}? " if alike else ""
    raise FileNotFoundError(
        f"no recipe {path}: neither a file nor in the package. {hint}Pass the path of a YAML file, or a name that "
        "`tensorpeft recipes` lists."
    )
