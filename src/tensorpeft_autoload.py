"""Imports `tensorpeft` whenever PEFT is imported, so that PEFT knows its methods without a word of the program's.

In an environment where a person asked for it: `tensorpeft enable-autoload` writes a .pth file that imports this module
in every process. So it must cost nothing until PEFT is imported: the standard library alone, and little of that.
"""

import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Finder:
    """Finds PEFT as everybody else does, and has it loaded by a loader that goes on to `tensorpeft`."""

    def __init__(self) -> None:
        self._is_asking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "peft" or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = find_spec(name)
        finally:
            self._is_asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # pyright: ignore[reportAttributeAccessIssue]
        return spec


class _Loader:
    """Another loader, and then an import."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            import tensorpeft  # noqa: F401
        except Exception as error:  # PEFT must work as if we were not there
            warnings.warn(
                f"tensorpeft is not loaded with peft: {type(error).__name__}: {error}. Install it again, or run "
                "tensorpeft enable-autoload --remove.",
                stacklevel=2,
            )


sys.meta_path.insert(0, _Finder())  # pyright: ignore[reportArgumentType]  # a finder in all but its class
