"""FSDP: what a run that shards its model needs besides what Trainer and accelerate do."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedTokenizerBase, Trainer

from tensorpeft.loading.adapters import put_adapter
from tensorpeft.tasks.task import StructureTask, Task
from tensorpeft.training.models import load_base
from tensorpeft.training.recipe import Recipe


def prepare_sharding(trainer: Trainer, recipe: Recipe, task: Task) -> None:
    """Check what a recipe, or accelerate's configuration, says of FSDP, and keep the adapter's precision.

    FSDP2's mixed precision is no autocast: it rounds all that is gathered, also the adapter's parameters, which are
    few, and of which no small step may be lost. So a base in that dtype is gathered, and computes, as it is.

    Raises:
        ValueError: FSDP is asked for and cannot be had, in a form that loses the adapter, or for a model of which no
            whole copy could be loaded for the tests.
    """
    is_wanted = bool(trainer.args.fsdp) or _accelerate_has("FSDP")
    if is_wanted and not is_sharded(trainer):
        raise ValueError(
            f"FSDP on {trainer.args.device.type}: accelerate shards on GPUs alone, and would train here "
            "with a whole model in each process. Start with accelerate launch on GPUs, or remove fsdp."
        )
    if not is_sharded(trainer):
        return
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version}: expected 2. The first wants one dtype, trained and frozen alike. "
            "Pass fsdp_version: 2."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "cpu_ram_efficient_loading: accelerate hands out parameters alone, not an adapter's frozen tensors. Pass "
            "fsdp_cpu_ram_efficient_loading: false."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"{plugin.state_dict_type}: Trainer would write no adapter. Pass fsdp_state_dict_type: FULL_STATE_DICT."
        )
    if recipe.adapter is not None:
        _check_dtype(trainer)
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    elif isinstance(task, StructureTask):
        raise ValueError("adapter: null with FSDP: a model that folds proteins cannot be loaded from a folder yet.")


def _check_dtype(trainer: Trainer) -> None:
    """Refuse mixed precision on a base that is in another: there would be none."""
    precision, model = trainer.accelerator.mixed_precision, cast(Any, trainer.model)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    frozen = [p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point() and p.ndim > 1]
    if wanted is not None and (other := set(frozen) - {wanted}):
        raise ValueError(
            f"{precision} with FSDP, on a base in {other.pop()}: FSDP has no autocast, and its mixed precision would "
            f"round the adapter. Pass model_arguments.dtype={str(wanted).removeprefix('torch.')}, or "
            f"trainer.{precision}=false."
        )


def _accelerate_has(what: str) -> bool:
    """Whether its configuration asks for it: `accelerate launch` says so to the processes that it starts."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def will_be_sharded(recipe: Recipe) -> bool:
    """Whether the recipe, or accelerate's configuration, asks for FSDP or DeepSpeed."""
    asked = any(recipe.trainer.get(name) for name in ("fsdp", "deepspeed"))
    return asked or _accelerate_has("FSDP") or _accelerate_has("DEEPSPEED")


def is_sharded(trainer: Trainer) -> bool:
    """Whether each process has a part of the model."""
    return bool(trainer.is_fsdp_enabled)


def shard(trainer: Trainer) -> None:
    """Shard the model of a trainer that is not going to train; accelerate takes it with an optimiser alone."""
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = trainer.model


def whole_model(
    trainer: Trainer,
    recipe: Recipe,
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,  # None: the task is no text
    folder: Path,  # of the saved adapter; of the model where all weights were trained
) -> nn.Module:
    """The trained model in one process: the trainer's own, or, of a sharded one, a new one with what was saved.

    A sharded model runs in all processes at once or not at all.
    """
    if not is_sharded(trainer):
        return trainer.accelerator.unwrap_model(trainer.model)
    if recipe.adapter is not None:
        base: Any = load_base(recipe, task, tokenizer, trainer.args.seed)
        return put_adapter(base, str(folder), recipe.model).to(trainer.args.device)
    trained: Any = load_base(replace(recipe, model=str(folder)), task, tokenizer, trainer.args.seed)
    return trained.to(trainer.args.device)
