"""A saved adapter on its base, as the class that a task wants, or on the base's shapes alone."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils.peft_utils import find_adapter_config_file

from tensorpeft.loading.architectures import build_empty, find_class
from tensorpeft.loading.errors import explained
from tensorpeft.loading.fitting import fit_vocabulary, has_whole_weights, labels_of
from tensorpeft.loading.models import (
    lacked_weights,
    lacking_weights,
    load_config,
    load_pretrained,
    load_tokenizer,
    pinned,
)
from tensorpeft.loading.names import resolve
from tensorpeft.loading.quiet import quiet
from tensorpeft.plugin.checkpoint import Source, check_config_file
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.quantization.quantizer import is_residual, put_starts
from tensorpeft.tasks.task import LabelTask, StructureTask, Task

_TOKENIZER_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_DTYPES = ("bfloat16", "float16", "float32")


def find_base(
    model: str,  # name of a base, or of a saved adapter
    adapter: str | Path | None,
) -> tuple[str, str | None]:
    """Names of base and adapter.

    Raises:
        ValueError: ``model`` is an adapter and so is ``adapter``, or its base is unknown or gone.
    """
    folder = resolve(model)
    with explained(folder):
        is_adapter = find_adapter_config_file(folder) is not None
    if not is_adapter:
        return model, None if adapter is None else str(adapter)
    if adapter is not None:
        raise ValueError(f"{model} is a saved adapter itself. Pass its base, or leave out {adapter}.")
    return base_of(load_adapter_config(folder), model), model


def load_adapter_config(adapter: str | os.PathLike[str]) -> PeftConfig:  # folder, or Hub name
    """The adapter's configuration.

    Raises:
        ValueError: it is not that of a method of PEFT.
    """
    check_config_file(Path(adapter))
    with explained(adapter):
        return PeftConfig.from_pretrained(str(adapter))


def base_of(
    config: PeftConfig,
    adapter: str | os.PathLike[str],  # for messages
    remedy: str = "Pass it, or what it was made from, such as a GGUF file (--base).",
) -> str:
    """The name of the base that an adapter's configuration records.

    Raises:
        ValueError: it records none, or a folder that is not there.
    """
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter}: its configuration names no base model. {remedy}")
    if Path(base).is_absolute() and not Path(base).exists():
        raise ValueError(f"{adapter}: its base model is no longer in {base}. {remedy}")
    return base


def load_model(
    base: str,  # as `resolve` takes it
    adapter: str | None,
    task: Task | None,  # None: one that a causal language model does
    dtype: str | None = None,  # None: as it was saved
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model, on the GPU where there is one, and tokenizer, of which the adapter's own comes first.

    Raises:
        ValueError: the head that the task needs is in neither base nor adapter, or the adapter is for another base.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected {', '.join(_DTYPES)}, or None for that of the checkpoint.")
    with quiet():
        pin = {} if adapter is None else pinned(load_adapter_config(adapter), base)
        own = None if adapter is None else _find_tokenizer(adapter)
        tokenizer = load_tokenizer(base, **pin) if own is None else load_tokenizer(own)
        model, missing = _load_base(base, task, dtype, tokenizer, pin)
        if torch.cuda.is_available() and next(model.parameters()).device.type == "cpu":
            model = model.to("cuda")  # pyright: ignore[reportArgumentType]
        _check_head(base, adapter, missing)
        return (model if adapter is None else put_adapter(model, adapter, base)).eval(), tokenizer


def _find_tokenizer(adapter: str) -> str | None:
    """The folder of an adapter's own tokenizer; None: it has none."""
    folder = Path(adapter)
    if not folder.is_dir():
        # Not by its name: offline, transformers would ask for a config.json, which an adapter has not.
        with explained(adapter):
            folder = Path(snapshot_download(adapter, allow_patterns=_TOKENIZER_PATTERNS))
    return str(folder) if (folder / TOKENIZER_CONFIG_FILE).is_file() else None


def load_on_skeleton(
    adapter: str | os.PathLike[str],  # folder
    base: str | None = None,  # as `resolve` takes it; None: what the adapter's configuration names
) -> PeftModel:
    """The adapter on its base on the meta device: all that needs the adapter's numbers and the base's shapes.

    QDoTA's adapters start from their base's cores, which are read, too.

    Raises:
        ValueError: the adapter does not say what its base model is, or that has no configuration to be found.
    """
    config = load_adapter_config(adapter)
    base = base or base_of(config, adapter, "Load the adapter on its model, and pass that PeftModel.")
    pin = pinned(config, base)
    with explained(adapter):
        source = Source(str(adapter), {})
        saved = source.read_shapes() or {}
    model_config = load_config(base, **pin)
    if (labels := labels_of(saved)) is not None:
        model_config.num_labels = labels
    model = build_empty(find_class(model_config, base, config), model_config)
    fit_vocabulary(model, saved)
    if is_residual(model_config) and source.is_of_residual_base():
        with explained(base):
            folder = resolve(base)
            if not Path(folder).is_dir():
                folder = snapshot_download(folder, revision=pin.get("revision"), allow_patterns="*.safetensors")
            put_starts(model, Path(folder))
    with explained(adapter):
        return PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True)  # pyright: ignore[reportArgumentType]


def put_adapter(model: nn.Module, adapter: str, base: str) -> PeftModel:
    """The saved adapter on its base.

    Raises:
        ValueError: the adapter is for another base.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            with explained(adapter):
                config, saved = load_adapter_config(adapter), Source(adapter, {}).read_shapes() or {}
                fit_vocabulary(model, saved)
                # Then an adapter's own start, decomposed for it, would be thrown away when its file is read. Not where
                # there are weights of the model itself: PEFT would put them as the file has them, in its dtype and no
                # longer tied.
                is_all = isinstance(config, TensorConfig) and not has_whole_weights(model, saved)
                return PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=is_all)  # pyright: ignore[reportArgumentType]
        except UserWarning as error:
            raise ValueError(
                f"{adapter}: not all of its layers are in {type(model).__name__} of {base}. Pass the base that it was "
                "trained on (--base)."
            ) from error


def _load_base(
    base: str, task: Task | None, dtype: str | None, tokenizer: PreTrainedTokenizerBase, pin: dict[str, str]
) -> tuple[PreTrainedModel, set[str]]:
    """The base, and the names of its weights that were not in the checkpoint."""
    arguments: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True, **pin}
    if isinstance(task, StructureTask):
        raise ValueError(
            f"{base}: a model that folds proteins cannot be loaded from a folder yet. Evaluate it in Python: "
            "tensorpeft.evaluation.evaluate_task(model, tokenizer, task, examples)."
        )
    if not isinstance(task, LabelTask):
        model, info = load_pretrained(AutoModelForCausalLM, base, **arguments)
        return model, set(info["missing_keys"])
    arguments |= {"num_labels": max(len(task.label_names), 1), "ignore_mismatched_sizes": True}
    model, info = load_pretrained(AutoModelForSequenceClassification, base, **arguments)
    if model.config.pad_token_id is None:
        # A decoder finds the last token of a text by it.
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, lacked_weights(info)


def _check_head(base: str, adapter: str | None, missing: set[str]) -> None:
    """Refuse a model with weights that started from noise."""
    with explained(str(adapter)):
        saved = set() if adapter is None else set(Source(adapter, {}).read_shapes() or ())
    if lacking := lacking_weights(missing, saved):
        where = base if adapter is None else f"{base} and {adapter}"
        raise ValueError(
            f"{where}: no trained weights {', '.join(lacking[:3])} for this task. Pass a model, or an adapter, that "
            "was trained on it."
        )
