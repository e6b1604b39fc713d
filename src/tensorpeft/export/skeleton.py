"""A saved adapter on a base model that has shapes but no weights: all that an export of the adapter needs."""

from __future__ import annotations

import importlib
import os

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import nn

_AUTO_CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


def load_on_skeleton(path: str | os.PathLike[str]) -> PeftModel:
    """The adapter saved in `path`, on its base model on the meta device.

    Raises:
        ValueError: the adapter does not say what its base model is, or that has no configuration to be found.
    """
    config = PeftConfig.from_pretrained(str(path))
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(
            f"{path}: adapter_config.json does not name a base model (base_model_name_or_path). Load the adapter on "
            "its model and pass that PeftModel."
        )
    try:
        model_config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot read the configuration of its base model {name!r} ({error}). Pass a PeftModel instead."
        ) from error
    with torch.device("meta"):
        base = _build(config, model_config)
    return PeftModel.from_pretrained(base, str(path), low_cpu_mem_usage=True)


def _build(config: PeftConfig, model_config: transformers.PretrainedConfig) -> nn.Module:
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    if auto_class is not None:
        return auto_class.from_config(model_config)
    mapping = config.auto_mapping or {}
    if "base_model_class" in mapping:
        module = importlib.import_module(mapping["parent_library"])
        return getattr(module, mapping["base_model_class"])(model_config)
    return transformers.AutoModel.from_config(model_config)
