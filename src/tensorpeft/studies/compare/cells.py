"""A cell of a comparison: plain data that any process of any machine runs alike, and that leaves everything on disk."""

import shutil
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import datasets
from huggingface_hub.utils import WeakFileLock
from rich.console import Console
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.loading.quiet import quiet
from tensorpeft.reports.files import write_lines
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.progress import Progress, ProgressTeller
from tensorpeft.training.recipe import Recipe
from tensorpeft.training.seed import run_seed, score_seed, score_untrained
from tensorpeft.training.splits import Splits, load_splits

FAILURE = "failure.txt"
Kind = Literal["train", "test", "untrained"]
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

    kind: Kind
    name: str
    recipe: Recipe
    seed: int
    folder: Path
    options: EvaluationOptions


def load_rows(recipe: Recipe, anew: bool = False) -> Splits:
    """`load_splits`, which this process remembers until other rows are asked for, or these ``anew``."""
    named_by = repr((recipe.task, replace(recipe.data, start_rows=None)))
    if anew or named_by not in _ROWS:
        _ROWS.clear()
        _ROWS[named_by] = load_splits(recipe)
    return _ROWS[named_by]


@quiet()
def run_cell(
    cell: Cell,
    on_progress: Callable[[Progress], object],  # called with how far its training is
) -> str:  # why it failed, in a line; "": it did not
    """Run a cell, its result or the traceback of its failure written to its folder."""
    if not cell.folder.is_dir():
        return (
            f"no folder {cell.folder} on {socket.gethostname()}: cells on several machines need the output folder on "
            "a disk that all of them see"
        )
    datasets.disable_progress_bars()
    try:
        # Whoever else runs it, such as the worker of a machine that was given up too early, is waited for.
        with WeakFileLock(cell.folder / _LOCK):
            _run(cell, load_rows(cell.recipe), on_progress)
    except Exception as error:
        write_lines(cell.folder / FAILURE, [traceback.format_exc().rstrip()])
        return f"{type(error).__name__}: {error}"
    return ""


def _run(cell: Cell, splits: Splits, on_progress: Callable[[Progress], object]) -> None:
    arguments = make_arguments(cell.recipe.trainer, splits.task, cell.folder, cell.seed, cell.recipe.rewards)
    console = Console(quiet=True)
    match cell.kind:
        case "train":
            # Without a test: its rows are for the runs that are chosen.
            untested, bar = replace(splits, test={}), ProgressTeller(on_progress)
            run_seed(cell.recipe, untested, arguments, cell.options, True, console, bar)
            for checkpoint in cell.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(checkpoint)
        case "test":
            score_seed(cell.recipe, splits, arguments, cell.options, console)
        case "untrained":
            score_untrained(cell.recipe, splits, arguments, cell.options, console)
