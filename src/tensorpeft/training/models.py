"""The model of a recipe, with its adapter, and its tokenizer."""

from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EsmConfig,
    EsmModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from tensorpeft.quantization import quantize_residual
from tensorpeft.tasks.task import LabelTask, StructureTask, Task
from tensorpeft.training.adapters import make_config
from tensorpeft.training.folding import VOCABULARY, build_folding_model
from tensorpeft.training.recipe import Recipe, check_keys

# What all ESM-2 models have in common.
_ESM2 = {
    "vocab_size": len(VOCABULARY),
    "pad_token_id": VOCABULARY.index("<pad>"),
    "mask_token_id": VOCABULARY.index("<mask>"),
    "position_embedding_type": "rotary",
    "token_dropout": True,
}


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a padding token pads with its end of sequence."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    recipe: Recipe,
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,  # None: the task is no text
    seed: int,  # of a head that starts from noise
) -> PreTrainedModel:
    """The model as it is before an adapter: quantised, where the recipe says so."""
    set_seed(seed)
    arguments = dict(recipe.model_arguments)
    model: Any
    if isinstance(task, StructureTask):
        model = _load_folding_model(recipe.model, arguments)
    elif isinstance(task, LabelTask):
        assert tokenizer is not None
        arguments.setdefault("num_labels", max(len(task.label_names), 1))
        model = _load_classifier(recipe.model, arguments)
        if task.label_names:
            model.config.id2label = dict(enumerate(task.label_names))
            model.config.label2id = {name: label for label, name in enumerate(task.label_names)}
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(recipe.model, **arguments)
    if recipe.quantize is not None:
        arguments = dict(recipe.quantize)
        config = adapter_config(recipe, task) if arguments.pop("residual", True) else None
        check_keys(arguments, ("rounds", "double_quant", "skip_modules"), "quantize")
        model = quantize_residual(model, config, **arguments)  # pyright: ignore[reportArgumentType]
    return model


def _load_classifier(name: str, arguments: dict[str, Any]) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_pretrained(name, **arguments)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: it cannot be loaded with a head of {arguments['num_labels']} outputs: {error}. If its head is of "
            "another task, write model_arguments: {ignore_mismatched_sizes: true}; it then starts from noise."
        ) from None


def _load_folding_model(name: str, arguments: dict[str, Any]) -> PreTrainedModel:
    """ESM-2 with a new folding head; ``random_esm`` (fields of EsmConfig) starts ESM-2 from noise, too."""
    fields, random_esm = ("num_blocks", "num_recycles", "trunk"), arguments.pop("random_esm", None)
    folding = {key: arguments.pop(key) for key in fields if key in arguments}
    if random_esm is not None:
        check_keys(arguments, fields, "model_arguments")
        return build_folding_model(EsmConfig(**_ESM2, **random_esm), **folding)
    return build_folding_model(EsmModel.from_pretrained(name, **arguments), **folding)


def adapter_config(recipe: Recipe, task: Task) -> PeftConfig | None:
    """The configuration of the recipe's adapter; None where all weights are trained."""
    if recipe.adapter is None:
        return None
    kinds = {LabelTask: "SEQ_CLS", StructureTask: None}
    return make_config(recipe.adapter, kinds.get(type(task), "CAUSAL_LM"))


def adapt(model: nn.Module, recipe: Recipe, task: Task) -> nn.Module:
    """The model with the recipe's adapter, or as it is where all weights are trained."""
    config = adapter_config(recipe, task)
    return model if config is None else get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
