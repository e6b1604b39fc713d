"""What a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("tensorpeft", "torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "datasets", "lm_eval")


def find_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
