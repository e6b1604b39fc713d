"""The name of a model -> what transformers takes: a folder, or the name of a repository on the Hub."""

import os
from pathlib import Path

from tensorpeft.loading.gguf import find_gguf, make_plain
from tensorpeft.loading.packages import package_paths

_PREFIX = "package:"
_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"


def resolve(name: str | os.PathLike[str]) -> str:
    """A folder of transformers' files, or a Hub name as it is.

    Args:
        name: a Hub name, a folder, a .gguf file, a folder with one .gguf file (or the parts of one) and no config.json,
            or ``package:NAME``: an installed Python package with one. NAME may end in ``*``, for several packages with
            the parts of one file, and go on with ``/PATH``.

    Raises:
        ImportError: a package is not installed, or the library that reads GGUF files.
        ValueError: no such file, several of them, or one that is not a causal language model (`make_plain`).
    """
    name = os.fspath(name)
    if name.startswith(_PREFIX):
        return _resolve_package(name)
    path = Path(name)
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{name}: no such file.")
        return make_plain([path])
    if path.is_dir() and not any((path / config).is_file() for config in (_CONFIG, _ADAPTER_CONFIG)):
        files = find_gguf([path], "*", name)
        return make_plain(files) if files else name
    return name


def _resolve_package(name: str) -> str:
    paths = package_paths(name.removeprefix(_PREFIX), name)
    if len(paths) == 1 and (paths[0].is_file() or (paths[0] / _CONFIG).is_file()):
        return resolve(paths[0])
    if files := find_gguf(paths, "**/*", name):
        return make_plain(files)
    models = [config.parent.relative_to(path) for path in paths for config in sorted(path.glob(f"**/{_CONFIG}"))]
    nearest = min(models, key=lambda folder: len(folder.parts), default=None)
    hint = f" Did you mean {name.rstrip('/')}/{nearest.as_posix()}?" if nearest else ""
    raise ValueError(f"{name}: no {_CONFIG} and no .gguf file in {paths[0]}.{hint}")
