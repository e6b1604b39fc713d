"""A model by its name: its configuration, its tokenizer, its weights."""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft import PeftConfig
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from tensorpeft.loading.architectures import find_class
from tensorpeft.loading.errors import explained, require_config
from tensorpeft.loading.fitting import labels_of
from tensorpeft.loading.names import resolve
from tensorpeft.quantization import quantizer as _quantizer  # noqa: F401  # residual bases load like others


def load_config(
    name: str,  # as `resolve` takes it
    **arguments: Any,  # of from_pretrained
) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ValueError: there is no such model.
    """
    folder = resolve(name)
    require_config(Path(folder))
    with explained(folder):
        return AutoConfig.from_pretrained(folder, **arguments)


def pinned(
    adapter: PeftConfig | None,
    base: str,  # name of the model that it is put on
) -> dict[str, str]:  # arguments of from_pretrained
    """The revision of the base that the adapter was trained on, if that is said, and the base is the one that it names.

    PEFT's auto classes load it, too.
    """
    if adapter is None or base != adapter.base_model_name_or_path or not adapter.revision:
        return {}
    return {"revision": adapter.revision}


def find_file(
    name: str | os.PathLike[str],  # of a model or an adapter: a folder, or a Hub name
    file: str,
    **arguments: Any,  # of `cached_file`
) -> Path | None:
    """Where one of its files is, downloaded if need be; None: it has none, or none is to be had."""
    found = cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **arguments,
    )
    return None if found is None else Path(found)


def load_tokenizer(
    name: str,  # as `resolve` takes it
    **arguments: Any,  # of from_pretrained
) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end of sequence.

    Raises:
        ValueError: there is no such model, or no tokenizer with it.
    """
    folder = resolve(name)
    with explained(folder):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
        except ValueError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{name}: no tokenizer that transformers can load ({reason})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(
    model_cls: Any,  # of transformers, or an auto class
    name: str,  # as `resolve` takes it
    **arguments: Any,  # of from_pretrained
) -> Any:
    """What the class's `from_pretrained` gives for this model.

    Raises:
        ValueError: there is no such model, its files are damaged, or an argument is one that neither transformers nor
            the model knows; the error of the library is its cause.
    """
    folder = resolve(name)
    require_config(Path(folder, arguments.get("subfolder", "")))
    with explained(folder):
        return model_cls.from_pretrained(folder, **arguments)


def load_as_saved(
    name: str,  # as `resolve` takes it
    adapter: PeftConfig | None = None,
    saved: Mapping[str, Tensor] = MappingProxyType({}),  # the tensors in the adapter's file, by name
    **arguments: Any,  # of from_pretrained
) -> PreTrainedModel:
    """The model with the head that its configuration names, or as the class that was adapted.

    Raises:
        ValueError: there is no such model, or it lacks weights that are not the adapter's.
    """
    pin = pinned(adapter, name)
    model_cls = find_class(load_config(name, **pin), name, adapter)
    if (labels := labels_of(saved)) is not None:  # the adapter's head takes the place of the base's, if that has one
        arguments |= {"num_labels": labels, "ignore_mismatched_sizes": True}
    model, info = load_pretrained(model_cls, name, output_loading_info=True, **pin, **arguments)
    if lacking := lacking_weights(lacked_weights(info), saved):
        # A model may have what its user never reads, such as a pooler.
        remedy = "" if adapter is None else ", or, if nothing reads them, merge in memory (merge_and_unload)"
        raise ValueError(
            f"{name}: no weights {', '.join(lacking[:3])}{', …' if lacking[3:] else ''} in its files: they would be "
            f"random numbers. Download or save the model again{remedy}."
        )
    return model


def lacked_weights(
    info: Mapping[str, Any],  # `output_loading_info` of from_pretrained
) -> set[str]:
    """Names of the model's weights that its files have not, or not in its size."""
    return set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}


def lacking_weights(
    missing: Iterable[str],  # names of a model's weights that its files lack
    saved: Collection[str],  # names of the tensors in its adapter's file
) -> list[str]:
    """What neither has: noise, if it were used."""
    return sorted(key for key in missing if f"base_model.model.{key}" not in saved)
