"""A cell of a comparison: plain data that any process of any machine runs alike, and that leaves everything on disk."""

import shutil
import socket
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import datasets
from huggingface_hub.utils import WeakFileLock
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.reports.files import write_lines
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.recipe import Recipe
from tensorpeft.training.run import quieten
from tensorpeft.training.seed import run_seed, score_seed, score_untrained
from tensorpeft.training.splits import Splits, load_splits

FAILURE = "failure.txt"
_LOCK = ".lock"
# The rows of this process, by what of a recipe names them: a worker reads them once for all its cells.
_ROWS: dict[str, Splits] = {}


@dataclass(frozen=True)
class Cell:
    """One thing to do.

    Args:
        kind: "train", "test" what was trained, or "untrained": test the model as it is before.
        name: what a person is told that runs.
        recipe: what is run, its learning rate included.
        seed: of head, adapter, order of the rows.
        folder: where all that it leaves is kept; it is there.
        options: of the tests.
    """

    kind: str
    name: str
    recipe: Recipe
    seed: int
    folder: Path
    options: EvaluationOptions


class Share(NamedTuple):
    """How far a cell is.

    Args:
        done: from 0 to 1.
        loss: the latest of the training; None: none yet.
    """

    done: float
    loss: float | None = None


class StepCounter(TrainerCallback):
    """Tells how far a run is.

    Args:
        on_share: called after every step.
    """

    def __init__(self, on_share: Callable[[Share], object]) -> None:
        self._on_share = on_share
        self._loss: float | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        """Tell it."""
        self._on_share(Share(state.global_step / max(state.max_steps, 1), self._loss))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **more: object,
    ) -> None:
        """Keep the loss."""
        self._loss = (logs or {}).get("loss", self._loss)


def load_rows(recipe: Recipe, anew: bool = False) -> Splits:
    """`load_splits`, which this process remembers until other rows are asked for, or these ``anew``."""
    named_by = repr((recipe.task, recipe.data))
    if anew or named_by not in _ROWS:
        _ROWS.clear()
        _ROWS[named_by] = load_splits(recipe)
    return _ROWS[named_by]


def run_cell(
    cell: Cell,
    on_share: Callable[[Share], object],  # called with how far it is
) -> str:  # why it failed, in a line; "": it did not
    """Run a cell, its result or the traceback of its failure written to its folder."""
    if not cell.folder.is_dir():
        return (
            f"no folder {cell.folder} on {socket.gethostname()}: cells on several machines need the output folder on "
            "a disk that all of them see"
        )
    quieten()
    datasets.disable_progress_bars()
    try:
        # Whoever else runs it, such as the worker of a machine that was given up too early, is waited for.
        with WeakFileLock(cell.folder / _LOCK):
            _KINDS[cell.kind](cell, load_rows(cell.recipe), on_share)
    except Exception as error:
        write_lines(cell.folder / FAILURE, [traceback.format_exc().rstrip()])
        return f"{type(error).__name__}: {error}"
    return ""


def _train(cell: Cell, splits: Splits, on_share: Callable[[Share], object]) -> None:
    """Train without a test: its rows are for the runs that are chosen."""
    untested, bar = replace(splits, test={}), StepCounter(on_share)
    run_seed(cell.recipe, untested, _arguments(cell, splits), cell.options, True, Console(quiet=True), bar)
    for checkpoint in cell.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)


def _test(cell: Cell, splits: Splits, on_share: Callable[[Share], object]) -> None:
    score_seed(cell.recipe, splits, _arguments(cell, splits), cell.options, Console(quiet=True))


def _test_untrained(cell: Cell, splits: Splits, on_share: Callable[[Share], object]) -> None:
    score_untrained(cell.recipe, splits, _arguments(cell, splits), cell.options, Console(quiet=True))


def _arguments(cell: Cell, splits: Splits) -> TrainingArguments:
    return make_arguments(cell.recipe.trainer, splits.task, cell.folder, cell.seed)


_KINDS: Mapping[str, Callable[[Cell, Splits, Callable[[Share], object]], None]] = {
    "train": _train,
    "test": _test,
    "untrained": _test_untrained,
}
