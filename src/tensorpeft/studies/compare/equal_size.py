"""Entries of equal size: every method's rank is set to come closest to one number of trained parameters."""

import copy
import dataclasses
from functools import cache, partial
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.peft_utils import find_adapter_config_file

from tensorpeft.loading.architectures import build_empty
from tensorpeft.loading.models import load_config
from tensorpeft.loading.names import resolve
from tensorpeft.studies.budget import closest_value
from tensorpeft.studies.compare.entries import Comparison, Entry
from tensorpeft.tasks.task import LabelTask, StructureTask, Task
from tensorpeft.training.head import is_head
from tensorpeft.training.models import adapter_config, load_base, load_tokenizer
from tensorpeft.training.recipe import Recipe

# Arguments of from_pretrained that change no module.
_OF_NUMBERS = {"dtype", "torch_dtype", "attn_implementation"}


def fit_budget(
    comparison: Comparison,
    task: Task,
    budget: int,  # trained parameters, the new head apart
) -> Comparison:
    """The comparison with every entry's knob at the value that comes closest to the budget.

    Counted on the meta device: nothing is decomposed. An entry without a knob, such as full fine-tuning, stays as it
    is; a knob called ``budget`` gets the number itself.

    Raises:
        ValueError: the budget is below 1, or an adapter cannot be built on the recipe's model.
    """
    if budget < 1:
        raise ValueError(f"budget={budget}: expected a number of parameters of at least 1.")
    base = _skeleton(comparison.recipe, task)
    entries = tuple(_fit(entry, base, task, budget) for entry in comparison.entries)
    return dataclasses.replace(comparison, entries=entries, budget=budget)


def _skeleton(recipe: Recipe, task: Task) -> nn.Module:
    """The recipe's model without numbers; it is loaded only where its configuration alone does not say all of it."""
    if not isinstance(task, StructureTask) and _OF_NUMBERS.issuperset(recipe.model_arguments):
        config: Any = load_config(recipe.model)
        is_quantised = getattr(config, "quantization_config", None) is not None
        if not is_quantised and find_adapter_config_file(resolve(recipe.model)) is None:
            if not isinstance(task, LabelTask):
                return build_empty(AutoModelForCausalLM, config)
            config.num_labels = max(len(task.label_names), 1)
            return build_empty(AutoModelForSequenceClassification, config)
    plain = dataclasses.replace(recipe, quantize=None)
    base: Any = load_base(plain, task, load_tokenizer(plain, task), seed=0)
    return base.to("meta")


def _fit(entry: Entry, base: nn.Module, task: Task, budget: int) -> Entry:
    if entry.knob is None or entry.recipe.adapter is None:
        return entry
    value = budget if entry.knob == "budget" else closest_value(cache(partial(_count, entry, base, task)), budget)
    return dataclasses.replace(
        entry, recipe=_with_knob(entry, value), label=f"{entry.label.split(f' {entry.knob}=')[0]} {entry.knob}={value}"
    )


def _with_knob(entry: Entry, value: int) -> Recipe:
    assert entry.recipe.adapter is not None
    return dataclasses.replace(entry.recipe, adapter={**entry.recipe.adapter, entry.knob: value})


def _count(entry: Entry, base: nn.Module, task: Task, value: int) -> int:
    config: Any = adapter_config(_with_knob(entry, value), task)
    with torch.device("meta"):  # what an adapter draws at random, too
        model: Any = get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True)  # pyright: ignore[reportArgumentType]
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_head(name, model))
