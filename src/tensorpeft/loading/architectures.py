"""From a configuration to the class of transformers that is built from it."""

from functools import cache
from typing import Any

import torch
import transformers
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tensorpeft.loading.errors import explained
from tensorpeft.loading.sizes import check_sizes

# By PEFT's task type.
_TASK_CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


def find_class(
    config: PretrainedConfig,
    model: str,  # for messages
    adapter: PeftConfig | None = None,  # that the model is for; None: the model as it was saved
) -> Any:
    """The class of the model, or an auto class: that of the adapter's task, where it knows the model, that which was
    adapted, or that which was saved.

    Raises:
        ValueError: transformers registers no model class of that name.
    """
    architectures = config.architectures or [None]
    if not isinstance(architectures, list):
        raise ValueError(f"{model}: architectures={architectures!r} in its configuration: expected a list of names.")
    name = architectures[0]
    if adapter is not None:
        task = str(getattr(adapter.task_type, "value", adapter.task_type))
        # Not every model that writes text is a causal language model to transformers: many that see images are not.
        if task in _TASK_CLASSES and (name is None or type(config) in _TASK_CLASSES[task]._model_mapping):
            return _TASK_CLASSES[task]
        mapping = adapter.auto_mapping or {}
        if not isinstance(mapping, dict):
            raise ValueError(f"{model}: auto_mapping={mapping!r} in the adapter's configuration: expected a mapping.")
        name = mapping.get("base_model_class") or name
    if name is None:
        return transformers.AutoModel
    # A file must not choose among all that transformers has, nor name a module to import.
    if not isinstance(name, str) or name not in _registered() or not hasattr(transformers, name):
        raise ValueError(
            f"{model}: transformers has no class {name!r}. Load the model with its own code, and pass it, or its "
            "PeftModel, to the function that this command calls."
        )
    return getattr(transformers, name)


def class_name(
    config: PretrainedConfig,
    model: str,  # for messages
    adapter: PeftConfig | None = None,
) -> str:
    """The name of the class that `find_class` comes to; where that is an auto class, of what it makes of this.

    Raises:
        ValueError: there is no such class.
    """
    found = find_class(config, model, adapter)
    if (mapping := getattr(found, "_model_mapping", None)) is None:
        return found.__name__
    if type(config) not in mapping:
        raise ValueError(f"{model}: {found.__name__} makes nothing of a {type(config).__name__}. Pass another base.")
    classes = mapping[type(config)]
    names = [cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))]
    return next((name for name in config.architectures or () if name in names), names[0])


def writes_text(
    config: PretrainedConfig,
    name: str,  # of the class that is made of it
) -> bool:
    """Whether a model is a decoder that writes text, of which it may also see images."""
    decoders = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return not config.is_encoder_decoder and any(name in names.values() for names in decoders)


def build_empty(
    model_cls: Any,  # as `find_class` gives it
    config: PretrainedConfig,
) -> PreTrainedModel:
    """The model on the meta device: shapes, and no numbers.

    Raises:
        ValueError: the configuration's values fit no such model.
    """
    name = type(config).__name__
    check_sizes(config.to_dict(), name)
    with explained(name), torch.device("meta"):
        return model_cls.from_config(config) if hasattr(model_cls, "from_config") else model_cls(config)


@cache
def _registered() -> frozenset[str]:
    """Names of the model classes in transformers' own mappings; to ask it for one imports that model's module."""
    mappings = [
        mapping
        for name, mapping in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
    ]
    values = [value for mapping in mappings for value in mapping.values()]
    names = {name for value in values for name in ([value] if isinstance(value, str) else value)}
    return frozenset(name for name in names if name)
