"""A start that looks at the training rows: frames from the gradient of the trainer's own loss."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer

from tensorpeft import initialize_from_gradients
from tensorpeft.training.activations import checkpoint_activations
from tensorpeft.training.sharding import is_sharded

# What TRL's losses write down for the next line of the log.
_LOGS = ("_metrics", "_total_train_tokens", "_stored_metrics")


def start_from_gradients(
    trainer: Trainer,
    num_rows: int,  # of the training rows, drawn by the seed of the run
) -> None:
    """Set the frames of the trainer's adapter, which has not been trained, by `initialize_from_gradients`.

    In batches of the training's size, with its checkpointing, so that no more memory is needed than to train. Where a
    loss is a mean over its batch's tokens, a row counts by its share of them, and batches count alike: other sizes of
    batches give other frames, by more than rounding where rows differ in length.

    Raises:
        ValueError: fewer rows, a model in shards, or what `initialize_from_gradients` refuses.
    """
    if is_sharded(trainer) or trainer.is_deepspeed_enabled:
        raise ValueError("data.start_rows: a model in shards has no gradients before it is trained. Start elsewhere.")
    (batches,) = row_batches(trainer, num_rows, int(trainer.args.seed))
    model: Any = trainer.model
    was_training = model.training
    logs = {name: copy.deepcopy(getattr(trainer, name)) for name in _LOGS if hasattr(trainer, name)}
    model.train()
    checkpoint_activations(trainer)
    try:
        initialize_from_gradients(
            model, batches, loss_of=lambda _, batch: loss_on(trainer, batch), seed=int(trainer.args.seed)
        )
    finally:
        model.train(was_training)
        for name, value in logs.items():
            setattr(trainer, name, value)


def row_batches(
    trainer: Trainer,
    num_rows: int,  # of each part
    seed: int,  # of the drawing
    parts: int = 1,
) -> list[Iterator[Any]]:
    """Batches of some training rows, as many in each as it trains on at a time; the parts have no row in common.

    Raises:
        ValueError: fewer rows than that.
    """
    rows: Any = trainer.train_dataset
    if num_rows * parts > len(rows):
        raise ValueError(f"rows: {parts} x {num_rows} are asked for, of {len(rows)} training rows. Ask for fewer.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [order[part * num_rows : (part + 1) * num_rows] for part in range(parts)]
    subsets: list[Any] = [rows.select(part) if hasattr(rows, "select") else [rows[k] for k in part] for part in chosen]
    # TRL's GRPO answers the questions of several steps at once.
    sampler: Any = trainer._get_eval_sampler
    size = trainer.args.train_batch_size * getattr(trainer.args, "steps_per_generation", 1)
    # Not `get_eval_dataloader`, which with persistent workers hands out the loader of its first call ever after, and,
    # like `get_test_dataloader`, has batches of another size, that may have no room.
    loaders = [trainer._get_dataloader(subset, "start", size, sampler) for subset in subsets]
    return [map(trainer._prepare_inputs, loader) for loader in loaders]


def loss_on(trainer: Trainer, batch: Any) -> torch.Tensor:
    """The loss that the trainer would take a step on."""
    model: Any = trainer.model
    with trainer.compute_loss_context_manager():
        loss: Any = trainer.compute_loss(model, batch)
    return loss
