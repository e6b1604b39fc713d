"""The source of Python's own standard library, for tasks that are on every machine."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "validation", "test")
# lib2to3's tests hold Python 2 on purpose.
_TESTS = {"test", "tests", "idle_test"}


def find_library(
    library: str | Path | None,  # folder of the standard library; None: this Python's
) -> Path:
    """The folder of the library's source.

    Raises:
        FileNotFoundError: the source is not installed as files.
    """
    root = Path(library) if library is not None else Path(sysconfig.get_path("stdlib"))
    if not any(root.glob("*.py")):
        raise FileNotFoundError(
            f"no Python source in {root}: the task reads the standard library's .py files, and this Python keeps them "
            "zipped or not at all. Use a Python installed with its source."
        )
    return root


def find_split(
    source: Path,  # "stdlib:train", "stdlib:validation" or "stdlib:test"
    task: str,  # its name
) -> str:
    """The split that a source names.

    Raises:
        ValueError: it names none.
    """
    library, _, split = str(source).partition(":")
    if library != "stdlib" or split not in SPLITS:
        raise ValueError(
            f"{source}: the task {task} reads this Python's own library. Expected one of "
            f"{', '.join(f'stdlib:{name}' for name in SPLITS)} as the source."
        )
    return split


def read_modules(
    root: Path,
    name: str,  # of a module or package
) -> Iterator[tuple[tuple[str, ...], ast.Module]]:
    """Dotted name and tree of a module, or of a package's modules but its tests; none where this Python lacks it."""
    package = root / name
    for path in sorted(package.rglob("*.py")) if package.is_dir() else [root / f"{name}.py"]:
        parts = path.relative_to(root).with_suffix("").parts
        if path.is_file() and not _TESTS & set(parts):
            yield parts, ast.parse(path.read_bytes())


def digest(text: str) -> str:
    """What rows and groups are ordered by, so that every machine has the same order and it tells nothing of them."""
    return hashlib.sha256(text.encode()).hexdigest()
