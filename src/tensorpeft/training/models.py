"""The model of a recipe, with its adapter, and its tokenizer."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    EsmConfig,
    EsmModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from tensorpeft import DotaConfig
from tensorpeft.loading import models as loading
from tensorpeft.models.folding import VOCABULARY, build_folding_model
from tensorpeft.quantization import quantize_residual
from tensorpeft.tasks.task import LabelTask, PreferenceTask, StructureTask, Task
from tensorpeft.training.adapters import make_config
from tensorpeft.training.head import new_modules, note_new, restrict_head, train_new
from tensorpeft.training.kept_base import find_kept, keep_base, read_start
from tensorpeft.training.recipe import Recipe, check_keys

# Arguments of from_pretrained that say which files are meant.
_FOR_BOTH = ("revision", "token", "trust_remote_code", "subfolder", "cache_dir")
# Of these, what does not hold for a base that is kept elsewhere.
_ELSEWHERE = ("revision", "subfolder")
# PEFT's starts of a LoRA that are a part of the weight; further ones want data.
_SUBTRACTED = ("pissa", "olora")
_DRAWN = "pissa_niter_"  # of these, the one that is a randomised decomposition
# Attribute of a base: the start that its weights lack, by the names of the adapter's parameters.
_START = "adapter_start"
# What all ESM-2 models have in common.
_ESM2 = {
    "vocab_size": len(VOCABULARY),
    "pad_token_id": VOCABULARY.index("<pad>"),
    "mask_token_id": VOCABULARY.index("<mask>"),
    "position_embedding_type": "rotary",
    "token_dropout": True,
}


def load_tokenizer(recipe: Recipe, task: Task) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the recipe's model, `tensorpeft.loading.models.load_tokenizer`'s; None: the task is no text."""
    if isinstance(task, StructureTask):
        return None
    shared = {key: recipe.model_arguments[key] for key in _FOR_BOTH if key in recipe.model_arguments}
    return loading.load_tokenizer(recipe.model, **shared)


def load_base(
    recipe: Recipe,
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,  # None: the task is no text
    seed: int,  # of a head that starts from noise
) -> PreTrainedModel:
    """The model as it is before an adapter: quantised, where the recipe says so, unless that base is kept already.

    With ``residual``, the adapter's start is left out of what is quantised: DoTA's cores are kept in the base, the
    start of a LoRA of PEFT's (PiSSA: QPiSSA) is what `adapt` begins with.
    """
    set_seed(seed)
    if recipe.quantize is None:
        return _load_whole(recipe, task, tokenizer)
    config = _written_config(recipe, task) if recipe.quantize.get("residual", True) else None
    is_random = str(getattr(config, "init_lora_weights", "")).startswith(_DRAWN)
    drawn_with = seed if is_random else None
    has_head = isinstance(task, LabelTask | StructureTask)  # which every seed draws anew
    if not has_head and (folder := find_kept(recipe, drawn_with)) is not None:
        arguments = {key: value for key, value in recipe.model_arguments.items() if key not in _ELSEWHERE}
        model = _load(AutoModelForCausalLM, str(folder), arguments)
        setattr(model, _START, read_start(folder))
        return model
    model, start = _quantise(_load_whole(recipe, task, tokenizer), recipe.quantize, config, task)
    setattr(model, _START, start)
    keep_base(model, tokenizer, start, recipe, drawn_with)
    return model


def _load_whole(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """The model before it is quantised."""
    arguments = dict(recipe.model_arguments)
    if isinstance(task, StructureTask):
        return _load_folding_model(recipe.model, arguments)
    if not isinstance(task, LabelTask):
        return _load(AutoModelForCausalLM, recipe.model, arguments)
    assert tokenizer is not None
    arguments.setdefault("num_labels", max(len(task.label_names), 1))
    model: Any = _load_classifier(recipe.model, arguments)
    if task.label_names:
        model.config.id2label = dict(enumerate(task.label_names))
        model.config.label2id = {name: label for label, name in enumerate(task.label_names)}
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _quantise(
    model: Any,
    quantize: Mapping[str, Any],
    config: Any,  # of the adapter whose start is left out; None: of none
    task: Task,
) -> tuple[Any, dict[str, Tensor]]:
    """The model in 4 bits, and the start that its weights lack and it does not keep itself."""
    arguments = {key: value for key, value in quantize.items() if key != "residual"}
    check_keys(arguments, ("rounds", "double_quant", "skip_modules"), "quantize")
    if config is not None:
        train_new(config, model)
    if new := new_modules(model):
        arguments["skip_modules"] = (*arguments.get("skip_modules", ()), *new)
    start: dict[str, Tensor] = {}
    if _leaves_residual(config):
        _check_residual(config, task, arguments.get("rounds", 1))
        model, start, config = *_without_start(model, config), None
    return quantize_residual(model, config, **arguments), start


def starts_in_base(config: PeftConfig | None) -> bool:
    """Whether an adapter's start can be left out of what a base in 4 bits keeps of its weights (``residual``)."""
    return isinstance(config, DotaConfig) or _leaves_residual(config)


def has_rounds(config: PeftConfig | None) -> bool:
    """Whether an adapter's start can be left out of a base in 4 bits in several rounds of both (``rounds``)."""
    return isinstance(config, DotaConfig)


def _leaves_residual(config: PeftConfig | None) -> bool:
    """Whether an adapter of PEFT's own takes its start from the weights and leaves them without it."""
    return str(getattr(config, "init_lora_weights", "")).startswith(_SUBTRACTED)


def _check_residual(config: Any, task: Task, rounds: int) -> None:
    if rounds != 1:
        raise ValueError(
            f"quantize.rounds={rounds}: expected 1 with init_lora_weights={config.init_lora_weights}, which takes its "
            "start from the weights once. Leave it out."
        )
    if isinstance(task, PreferenceTask):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights} on a base in 4 bits: preferences are measured against the "
            "model without its adapter, which here lacks the start. Start otherwise, with quantize: {residual: false}."
        )


def _without_start(model: Any, config: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model whose weights lack an adapter's start, and that start by its parameters' names."""
    adapted: Any = get_peft_model(model, config)
    start = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    return adapted.unload(), start


def _load(auto: Any, name: str, arguments: dict[str, Any]) -> Any:
    _check_dtype(arguments)
    try:
        return loading.load_pretrained(auto, name, **arguments)
    except ValueError as error:
        if isinstance(error.__cause__, TypeError):  # an argument that neither transformers nor the model knows
            raise ValueError(f"{name}: model_arguments {sorted(arguments)}: {error.__cause__}") from error.__cause__
        raise


def _check_dtype(arguments: Mapping[str, Any]) -> None:
    for key in ("dtype", "torch_dtype"):
        name = arguments.get(key)
        if isinstance(name, str) and name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"model_arguments.{key}={name!r}: expected auto, float32, bfloat16 or float16.")


def _load_classifier(name: str, arguments: dict[str, Any]) -> PreTrainedModel:
    try:
        model, info = _load(AutoModelForSequenceClassification, name, {**arguments, "output_loading_info": True})
    except ValueError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        raise ValueError(
            f"{name}: it cannot be loaded with a head of {arguments['num_labels']} outputs: {error.__cause__}. If its "
            "head is of another task, write model_arguments: {ignore_mismatched_sizes: true}; it then starts from "
            "noise."
        ) from None
    note_new(model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    return model


def _load_folding_model(name: str, arguments: dict[str, Any]) -> PreTrainedModel:
    """ESM-2 with a new folding head; ``random_esm`` (fields of EsmConfig) starts ESM-2 from noise, too."""
    fields, random_esm = ("num_blocks", "num_recycles", "trunk"), arguments.pop("random_esm", None)
    folding = {key: arguments.pop(key) for key in fields if key in arguments}
    if random_esm is not None:
        check_keys(arguments, fields, "model_arguments")
        model = build_folding_model(EsmConfig(**_ESM2, **random_esm), **folding)
    else:
        model = build_folding_model(loading.load_pretrained(EsmModel, name, **arguments), **folding)
    note_new(model, [f"head.{parameter}" for parameter, _ in model.head.named_parameters()])
    return model


def adapter_config(recipe: Recipe, task: Task) -> PeftConfig | None:
    """The configuration of the recipe's adapter on its base; None where all weights are trained."""
    config: Any = _written_config(recipe, task)
    if recipe.quantize is not None and recipe.quantize.get("residual", True) and _leaves_residual(config):
        config.init_lora_weights = True  # the base lacks the start already: it is not taken from it again, see `adapt`
    return config


def _written_config(recipe: Recipe, task: Task) -> PeftConfig | None:
    if recipe.adapter is None:
        return None
    kinds = {LabelTask: "SEQ_CLS", StructureTask: None}
    return make_config(recipe.adapter, kinds.get(type(task), "CAUSAL_LM"))


def adapt(model: nn.Module, recipe: Recipe, task: Task) -> nn.Module:
    """The model with the recipe's adapter, or as it is where all weights are trained."""
    if recipe.head is not None:
        restrict_head(model, recipe.head)
    config = adapter_config(recipe, task)
    if config is None:
        return model
    train_new(config, model)
    start: dict[str, Tensor] = getattr(model, _START, {})
    # A base that was quantised is a folder of ours, which has no revisions.
    revision = recipe.model_arguments.get("revision") if recipe.quantize is None else None
    adapted = get_peft_model(model, config, revision=revision)  # pyright: ignore[reportArgumentType]
    for name, parameter in adapted.named_parameters():
        if name in start:
            parameter.data = start[name].clone().to(parameter.device)
    return adapted
