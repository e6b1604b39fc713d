"""A recipe's ``adapter`` as the configuration it names, of ours or of PEFT's."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import tensorpeft  # noqa: F401  # registers our methods
from tensorpeft.training.fields import check_types
from tensorpeft.training.recipe import check_keys


def make_config(
    adapter: Mapping[str, Any],  # method, and fields of its configuration
    task_type: str | None,  # PEFT's, such as "CAUSAL_LM"
) -> PeftConfig:
    """The configuration of a method: ``dota``, ``lorta``, ``lora``, ``vera``, … as PEFT's types are called.

    Raises:
        ValueError: the method or a field is unknown, or the configuration refuses a value.
    """
    methods, name = _methods(), str(adapter["method"]).lower()
    check_keys([name], methods, "adapter.method")
    # Copied, because PEFT adds a classifier to the very list of modules_to_save.
    arguments = {key: copy.deepcopy(value) for key, value in adapter.items() if key != "method"}
    config_class = methods[name]
    known = [field.name for field in dataclasses.fields(config_class) if field.init]
    check_keys(arguments, known, f"adapter, method {name}")
    if "task_type" in known:
        arguments.setdefault("task_type", task_type)
    # PEFT means any number where it says int: lora_alpha.
    whole = {k: int(v) if isinstance(v, float) and math.isfinite(v) else v for k, v in arguments.items()}
    check_types(whole, config_class, "adapter")
    try:
        config = config_class(**arguments)
    except TypeError as error:
        raise ValueError(f"adapter, method {name}: {error}") from None
    if config.is_prompt_learning and getattr(config, "num_virtual_tokens", 0) is None:
        raise ValueError(f"adapter, method {name}: num_virtual_tokens is missing, how many it puts before a text.")
    return config


def is_ours(adapter: Mapping[str, Any]) -> bool:  # as `make_config` takes it
    """Whether its method is one of this package, and not PEFT's own."""
    return _methods()[str(adapter["method"]).lower()].__module__.startswith("tensorpeft.")


def _methods() -> dict[str, type[PeftConfig]]:
    return {str(getattr(key, "value", key)).lower(): cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
