"""A start that looks at the training rows: frames from the gradient of the trainer's own loss."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer

from tensorpeft import initialize_from_gradients
from tensorpeft.training.sharding import is_sharded

# What TRL's losses write down for the next line of the log.
_LOGS = ("_metrics", "_total_train_tokens", "_stored_metrics")


def start_from_gradients(
    trainer: Trainer,
    num_rows: int,  # of the training rows, drawn by the seed of the run
) -> None:
    """Set the frames of the trainer's adapter, which has not been trained, by `initialize_from_gradients`.

    Raises:
        ValueError: fewer rows, a model in shards, or what `initialize_from_gradients` refuses.
    """
    if is_sharded(trainer) or trainer.is_deepspeed_enabled:
        raise ValueError("data.start_rows: a model in shards has no gradients before it is trained. Start elsewhere.")
    rows: Any = trainer.train_dataset
    if num_rows > len(rows):
        raise ValueError(f"data.start_rows={num_rows}: expected at most the {len(rows)} training rows.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(int(trainer.args.seed)))
    chosen = order[:num_rows].tolist()
    subset = rows.select(chosen) if hasattr(rows, "select") else [rows[k] for k in chosen]
    loader = trainer.get_eval_dataloader(subset)

    def batches() -> Iterator[Any]:
        for batch in loader:
            yield trainer._prepare_inputs(batch)

    def loss_of(model: Any, batch: Any) -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, batch)

    model: Any = trainer.model
    was_training, logs = (
        model.training,
        {name: copy.deepcopy(getattr(trainer, name)) for name in _LOGS if hasattr(trainer, name)},
    )
    model.train()
    try:
        initialize_from_gradients(model, batches(), loss_of=loss_of, seed=int(trainer.args.seed))
    finally:
        model.train(was_training)
        for name, value in logs.items():
            setattr(trainer, name, value)
