"""Sizes that no model has: refused before anything of them is built."""

import re
from collections.abc import Mapping
from typing import Any

_IS_SIZE = re.compile(r"(size|dim|heads?|layers?|blocks?|experts|channels|n_embd|n_inner|d_ff|d_kv|d_model)s?$|^num_")
_LARGEST, _MOST_LAYERS = 2**30, 2**12


def check_sizes(
    config: Mapping[str, Any],  # a model's, as JSON has it
    name: str,  # for messages
) -> None:
    """Refuse a configuration with sizes that would take for ever to build, or not fit any machine.

    Raises:
        ValueError: names the field, the value and what is accepted.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool) and _IS_SIZE.search(str(key)):
            most = _MOST_LAYERS if re.search("layers?$|blocks?$", str(key)) else _LARGEST
            if abs(value) > most:
                raise ValueError(f"{name}: {key}={value:.4g} in its configuration: expected at most {most}.")
