"""How the command reaches the package `tensorpeft`: a plain file of it at once, the whole when it is needed."""

import functools
import gc
import logging
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@functools.cache
def read_plain(name: str) -> dict[str, Any]:
    """The names that a file of the package defines, such as "studies/catalogue.py", the package not being imported.

    The file must need nothing but the standard library.
    """
    spec = find_spec("tensorpeft")
    assert spec is not None
    assert spec.origin is not None
    return runpy.run_path(str(Path(spec.origin).parent / name))


def import_package() -> None:
    """Import `tensorpeft`, which takes seconds. What stands above a call answers at once."""
    if "tensorpeft" in sys.modules:
        return
    # On some processors it misses an optional kernel at its import, and says so; it has another.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import tensorpeft  # noqa: F401

    # It is never garbage: no collection looks at it any more, not even the one at the exit, which would take a second.
    gc.freeze()
