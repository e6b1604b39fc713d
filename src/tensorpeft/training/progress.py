"""The bar of a training run."""

from collections.abc import Mapping

from rich.console import Console
from transformers import TrainerCallback

from tensorpeft.reports.terminal import make_progress


class ProgressBar(TrainerCallback):
    """One bar over the steps of a run, with the latest losses.

    A context that leaves the bar as it stands.

    Args:
        console: where it is drawn, by the main process.
        name: of the run.
    """

    def __init__(self, console: Console, name: str) -> None:
        self._losses = {"loss": "", "eval_loss": ""}
        self._name = name
        self._progress = make_progress(console, width=42)
        self._bar = self._progress.add_task(name, total=None)

    def on_train_begin(self, args, state, control, **more) -> None:
        """Show the bar, where an interrupted run left it."""
        if state.is_world_process_zero:
            self._progress.update(self._bar, total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_step_end(self, args, state, control, **more) -> None:
        """Move on by a step."""
        self._progress.update(self._bar, completed=state.global_step)

    def on_log(self, args, state, control, logs: Mapping[str, float] | None = None, **more) -> None:
        """Show the latest losses."""
        for key in self._losses:
            if key in (logs or {}):
                self._losses[key] = f"{(logs or {})[key]:.4f}"
        loss, validation = self._losses.values()
        text = self._name + (f", loss {loss}" if loss else "") + (f", validation {validation}" if validation else "")
        self._progress.update(self._bar, description=text)

    def on_train_end(self, args, state, control, **more) -> None:
        """Leave the bar as it stands: others may draw now."""
        self._progress.stop()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
