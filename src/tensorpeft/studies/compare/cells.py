"""The cells of a comparison: run, kept, and not run again."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.studies.compare.entries import Comparison, Entry
from tensorpeft.studies.compare.results import Run
from tensorpeft.studies.rates import rates_beyond
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.recipe import Recipe
from tensorpeft.training.seed import RESULTS, WHOLE_MODEL, check_output, kept_folder, run_seed, score_seed
from tensorpeft.training.splits import Splits


class StepCounter(TrainerCallback):
    """Tells the share of a run that is done.

    Args:
        on_share: called with a number from 0 to 1.
    """

    def __init__(self, on_share: Callable[[float], object]) -> None:
        self._on_share = on_share

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        """Tell it."""
        self._on_share(state.global_step / max(state.max_steps, 1))


@dataclass(frozen=True)
class Runner:
    """Runs the cells of a comparison on the same rows.

    Args:
        comparison: what is compared.
        splits: the rows of all.
        options: of the tests.
        on_run: called with a description before a cell.
        on_share: called with the share of the cell that is done.
        on_done: called after a cell, or for one that was done before.
        on_more: called with a number of further cells that will be run.
    """

    comparison: Comparison
    splits: Splits
    options: EvaluationOptions
    on_run: Callable[[str], object]
    on_share: Callable[[float], object]
    on_done: Callable[[], object]
    on_more: Callable[[int], object]

    def search(self, entry: Entry) -> tuple[Run, ...]:
        """A run per learning rate with the first seed, going on beyond an edge that is the best; by rate."""
        runs = [self._train(entry, rate, 0) for rate in entry.rates]
        while len(runs) < len(entry.rates) + self.comparison.widenings:
            best = min(runs, key=lambda run: run.loss)
            todo = rates_beyond([run.rate for run in runs], best.rate) if best.result is not None else []
            if not todo:
                break
            self.on_more(1)
            runs.append(self._train(entry, todo[0], 0))
        return tuple(sorted(runs, key=lambda run: run.rate))

    def finish(self, entry: Entry, search: tuple[Run, ...]) -> tuple[Run, ...]:
        """A run per seed at the best rate of the search, tested; none where the whole search failed."""
        best = min(search, key=lambda run: run.loss)
        if best.result is None:
            return ()
        for run in search:
            if run is not best:  # adapters are small, whole models are not
                shutil.rmtree(self.folder(entry, run.rate, run.seed) / WHOLE_MODEL, ignore_errors=True)
        more = [self._train(entry, best.rate, seed) for seed in range(1, self.comparison.seeds)]
        return tuple(self._test(entry, run) for run in (best, *more))

    def folder(self, entry: Entry, rate: float, seed: int) -> Path:
        """Where a cell is kept."""
        return self.comparison.output / "entries" / entry.key / f"rate-{rate:g}" / f"seed-{seed}"

    def cell_recipe(self, entry: Entry, rate: float) -> Recipe:
        """What a cell runs."""
        trainer = {**entry.recipe.trainer, "learning_rate": rate}
        output = str(self.comparison.output / "entries" / entry.key)
        return dataclasses.replace(entry.recipe, trainer=trainer, output=output, seeds=(0,))

    def _train(self, entry: Entry, rate: float, seed: int) -> Run:
        self.on_run(f"{entry.label}, rate {rate:g}, seed {seed}")
        folder, recipe = self.folder(entry, rate, seed), self.cell_recipe(entry, rate)
        check_output(folder.parent, recipe, resume=True)
        try:
            arguments = make_arguments(recipe.trainer, self.splits.task, folder, seed)
            untested, quiet = dataclasses.replace(self.splits, test={}), Console(quiet=True)
            bar = StepCounter(self.on_share)
            result = run_seed(recipe, untested, arguments, self.options, True, quiet, bar)
            for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(checkpoint)
            return Run(rate, seed, result)
        except Exception as error:
            return Run(rate, seed, None, f"{type(error).__name__}: {error}")
        finally:
            self.on_done()

    def _test(self, entry: Entry, run: Run) -> Run:
        if run.result is None or not self.splits.test:
            return run
        self.on_run(f"{entry.label}, test, seed {run.seed}")
        recipe, folder = self.cell_recipe(entry, run.rate), self.folder(entry, run.rate, run.seed)
        if not run.result.tests and not (folder / kept_folder(recipe)).is_dir():  # another rate was the best before
            (folder / RESULTS).unlink()
            self.on_more(1)
            run = self._train(entry, run.rate, run.seed)
        try:
            arguments = make_arguments(recipe.trainer, self.splits.task, folder, run.seed)
            result = score_seed(recipe, self.splits, arguments, self.options, Console(quiet=True))
            return dataclasses.replace(run, result=result)
        except Exception as error:
            return Run(run.rate, run.seed, None, f"test: {type(error).__name__}: {error}")
