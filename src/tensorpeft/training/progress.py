"""How far a training run is, and a bar of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from transformers import TrainerCallback

from tensorpeft.reports.terminal import make_progress


class Progress(NamedTuple):
    """How far a run is.

    Args:
        step: optimiser steps that are done.
        steps: all of them; 0: not known yet.
        loss: the latest of the training; None: none yet.
        validation: the latest loss of the validation.
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    validation: float | None = None

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.step / max(self.steps, 1)


class ProgressTeller(TrainerCallback):
    """Tells how far a run is.

    Args:
        on_progress: called where the run begins, after every step and with every loss.
    """

    def __init__(self, on_progress: Callable[[Progress], object]) -> None:
        self._on_progress = on_progress
        self._losses: dict[str, float | None] = {"loss": None, "eval_loss": None}

    def on_step_end(self, args, state, control, **more) -> None:
        """Tell it."""
        self._on_progress(Progress(state.global_step, state.max_steps, *self._losses.values()))

    on_train_begin = on_step_end  # where an interrupted run stood

    def on_log(self, args, state, control, logs: Mapping[str, float] | None = None, **more) -> None:
        """Tell the latest losses."""
        self._losses |= {key: loss for key, loss in (logs or {}).items() if key in self._losses}
        self.on_step_end(args, state, control)


@contextmanager
def steps_bar(console: Console, name: str) -> Iterator[Callable[[Progress], None]]:
    """A bar over the steps of a run, with the latest losses, as what is to be called with its progress."""
    bars = make_progress(console, width=42)
    bar = bars.add_task(name, total=None)

    def show(found: Progress) -> None:
        bars.start()  # not before: what prepares many rows draws bars of its own
        losses = {"loss": found.loss, "validation": found.validation}
        text = "".join(f", {key} {loss:.4f}" for key, loss in losses.items() if loss is not None)
        bars.update(bar, description=name + text, completed=found.step, total=found.steps)

    try:
        yield show
    finally:
        bars.stop()
