"""A model looked at amid its training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout; afterwards every module is as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # By train(), in which our layers free the weights that they kept for inference; then, for a model that was
        # trained in part, module by module.
        model.train(training[model])
        for module, was_training in training.items():
            module.training = was_training
