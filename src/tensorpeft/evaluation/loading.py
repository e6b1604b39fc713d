"""The model to evaluate: a base, or a saved adapter on its base, as the class that a task wants."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from tensorpeft.tasks.task import LabelTask, StructureTask, Task

_DTYPES = ("bfloat16", "float16", "float32")


def find_base(
    model: str,  # folder or Hub name of a base, or of a saved adapter
    adapter: str | Path | None,
) -> tuple[str, str | None]:
    """Names of base and adapter.

    Raises:
        ValueError: ``model`` is an adapter and so is ``adapter``, or it does not name its base.
    """
    if find_adapter_config_file(model) is None:
        return model, None if adapter is None else str(adapter)
    if adapter is not None:
        raise ValueError(f"{model} is a saved adapter itself. Pass its base, or leave out {adapter}.")
    base = PeftConfig.from_pretrained(model).base_model_name_or_path
    if not base:
        raise ValueError(f"{model}: its configuration names no base model. Pass it (--base).")
    return base, model


def load_model(
    base: str,
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
        own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(adapter if own else base)
        model, missing = _load_base(base, task, dtype, tokenizer)
        if torch.cuda.is_available() and next(model.parameters()).device.type == "cpu":
            model = model.to("cuda")  # pyright: ignore[reportArgumentType]
        _check_head(base, adapter, missing)
        return (model if adapter is None else _put_adapter(model, adapter, base)).eval(), tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Keep out of a terminal what the libraries say about every load."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Until PEFT reads is_activation_checkpointing instead of the attribute that transformers renames.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_base(
    base: str, task: Task | None, dtype: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, set[str]]:
    """The base, and the names of its weights that were not in the checkpoint."""
    arguments: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
    if isinstance(task, StructureTask):
        raise ValueError(
            f"{base}: a model that folds proteins cannot be loaded from a folder yet. Evaluate it in Python: "
            "tensorpeft.evaluation.evaluate_task(model, tokenizer, task, examples)."
        )
    if not isinstance(task, LabelTask):
        loaded: Any = AutoModelForCausalLM.from_pretrained(base, **arguments)
        return loaded[0], set(loaded[1]["missing_keys"])
    num_labels = max(len(task.label_names), 1)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=num_labels, ignore_mismatched_sizes=True, **arguments
    )
    model, info = loaded
    if model.config.pad_token_id is None:
        # A decoder finds the last token of a text by it.
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}


def _check_head(base: str, adapter: str | None, missing: set[str]) -> None:
    """Refuse a model with weights that started from noise."""
    saved = set() if adapter is None else set(load_peft_weights(adapter, device="cpu"))
    if lacking := sorted(key for key in missing if f"base_model.model.{key}" not in saved):
        where = base if adapter is None else f"{base} and {adapter}"
        raise ValueError(
            f"{where}: no trained weights {', '.join(lacking[:3])} for this task. Pass a model, or an adapter, that "
            "was trained on it."
        )


def _put_adapter(model: nn.Module, adapter: str, base: str) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            return PeftModel.from_pretrained(model, adapter)  # pyright: ignore[reportArgumentType]
        except UserWarning as error:
            raise ValueError(
                f"{adapter}: not all of its layers are in {type(model).__name__} of {base}. Pass the base that it was "
                "trained on (--base)."
            ) from error
