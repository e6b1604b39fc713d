"""What of a forward pass is kept for the backward one: as a running `Trainer` keeps it, before one runs."""

from typing import Any

from transformers import Trainer

# Of the arguments that say how activations are checkpointed, those that are not torch's.
_NOT_OF_TORCH = ("every_n_layers", "offload")


def checkpoint_activations(trainer: Trainer) -> None:
    """Switch checkpointing on where the trainer's arguments say so, as `Trainer.train` does when it begins.

    A step that is taken outside of it would else need the memory, and take the time, of another one.
    """
    arguments, model = trainer.args, trainer.model
    if not arguments.gradient_checkpointing:
        return
    said: Any = arguments.gradient_checkpointing_kwargs
    given = dict(said or {})
    options = {name: given.pop(name) for name in _NOT_OF_TORCH if name in given}
    # transformers has renamed it within its version 5.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        enable = getattr(model, "gradient_checkpointing_enable")  # noqa: B009
    enable(given or None, **options)
