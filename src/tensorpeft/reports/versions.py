"""What a result depends on."""

import platform
from collections.abc import Mapping, Sequence
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


def tell_differing(
    found: Sequence[tuple[str, Mapping[str, str]]],  # what was found with them, and versions; none: not known
) -> list[str]:
    """A line that names every library of which there were several versions, and what was found with which; or none.

    >>> tell_differing([("LoRA", {"torch": "2.6"}), ("DoTA", {"torch": "2.7"}), ("DoRA", {"torch": "2.7"})])
    ['Versions differ: torch 2.6 (LoRA), 2.7 (DoTA, DoRA).']
    """
    whose: dict[str, dict[str, list[str]]] = {}
    for name, versions in found:
        for library, number in versions.items():
            names = whose.setdefault(library, {}).setdefault(number, [])
            names.extend([name] if name not in names else [])
    told = [
        f"{library} " + ", ".join(f"{number} ({', '.join(names)})" for number, names in by_version.items())
        for library, by_version in whose.items()
        if len(by_version) > 1
    ]
    return [f"Versions differ: {'; '.join(told)}."] if told else []
