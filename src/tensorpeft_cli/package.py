"""How the command reaches the package `tensorpeft`: a plain file of it at once, the whole when it is needed."""

import functools
import gc
import logging
import runpy
import sys
import warnings
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


def one_line(text: object) -> str:
    """A text that a person has named, or that quotes one, as it is printed: on one line, and no terminal obeys it."""
    return read_plain("reports/tables.py")["one_line"](str(text))


def import_package() -> None:
    """Import `tensorpeft`, which takes seconds, and keep out of the terminal what libraries say to their own callers.

    What stands above a call of this function answers at once.
    """
    # On some processors it misses an optional kernel at its import, and says so; it has another.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Until PEFT and the recipes, which are read by older versions too, take transformers' new name of it.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    is_new = "tensorpeft" not in sys.modules
    import tensorpeft  # noqa: F401

    if is_new:
        # Never garbage: no collection looks at it any more, not even the one at the exit, which would take a second.
        gc.freeze()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
