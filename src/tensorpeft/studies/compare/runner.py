"""The way of an entry through its cells: the search for its rate, the other seeds at it, the tests."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.reports.files import write_lines
from tensorpeft.studies.compare.cells import FAILURE, Cell, Kind
from tensorpeft.studies.compare.engine import Engine
from tensorpeft.studies.compare.entries import Comparison, Entry, entry_folder
from tensorpeft.studies.compare.progress import CellsBar
from tensorpeft.studies.compare.results import Run
from tensorpeft.studies.compare.slots import LostCellError
from tensorpeft.studies.rates import rates_beyond
from tensorpeft.training.recipe import Recipe
from tensorpeft.training.results import SeedResult, read_result
from tensorpeft.training.seed import RESULTS, WHOLE_MODEL, check_output, check_rows, kept_folder


@dataclass(frozen=True)
class Runner:
    """Brings entries through their cells; called from several threads, one per entry.

    Args:
        comparison: what is compared.
        has_tests: whether there are rows to test on.
        options: of the tests.
        engine: runs the cells.
        bar: told of them.
        digests: of the rows, by split.
    """

    comparison: Comparison
    has_tests: bool
    options: EvaluationOptions
    engine: Engine
    bar: CellsBar
    digests: Mapping[str, str] = field(default_factory=dict)

    def run(self, entry: Entry) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """The runs of `search` and `finish`; of an entry that is not trained, no search and its test."""
        if not entry.rates:
            return (), (self._train(entry, 0.0, 0, "untrained"),)
        search = self.search(entry)
        return search, self.finish(entry, search)

    def search(self, entry: Entry) -> tuple[Run, ...]:
        """A run per learning rate with the first seed, going on beyond an edge that is the best; by rate."""
        runs = self.engine.each(lambda rate: self._train(entry, rate, 0), entry.rates)
        widenings = self.comparison.widenings if len(runs) > 1 else 0  # one rate is no grid to go beyond
        while len(runs) < len(entry.rates) + widenings:
            best = min(runs, key=lambda run: run.loss)
            todo = rates_beyond([run.rate for run in runs], best.rate) if best.result is not None else []
            if not todo:
                break
            self.bar.expect(1)
            runs.append(self._train(entry, todo[0], 0))
        return tuple(sorted(runs, key=lambda run: run.rate))

    def finish(self, entry: Entry, search: Sequence[Run]) -> tuple[Run, ...]:
        """A run per seed at the best rate of the search, tested; none where the whole search failed."""
        best = min(search, key=lambda run: run.loss)
        if best.result is None:
            return ()
        for run in search:
            if run is not best:  # adapters are small, whole models are not
                shutil.rmtree(self.folder(entry, run.rate, run.seed) / WHOLE_MODEL, ignore_errors=True)
        more = self.engine.each(lambda seed: self._train(entry, best.rate, seed), range(1, self.comparison.seeds))
        return tuple(self.engine.each(lambda run: self._test(entry, run), (best, *more)))

    def folder(self, entry: Entry, rate: float, seed: int) -> Path:
        """Where a cell is kept."""
        return entry_folder(self.comparison.output, entry) / f"rate-{rate:g}" / f"seed-{seed}"

    def check_folders(self) -> None:
        """Refuse to go on with the cells of another recipe, or of other rows.

        Raises:
            ValueError: the output folder holds some, at these rates or at others; names the field and both values, or
                the source of the rows.
        """
        for entry in self.comparison.entries:
            for rate in entry.rates or (0.0,):
                self._check(self.folder(entry, rate, 0), self._recipe(entry, rate))
            for folder in sorted(entry_folder(self.comparison.output, entry).glob("rate-*")):
                recipe = self._recipe(entry, 0.0)
                check_output(folder, recipe, resume=True, is_tested_later=True, at_any_rate=True)
                check_rows(folder, recipe, self.digests)

    def _check(self, folder: Path, recipe: Recipe) -> None:
        """Refuse a folder with cells of another recipe. All are trained without tests, and tested later."""
        check_output(folder.parent, recipe, resume=True, is_tested_later=True)
        check_rows(folder.parent, recipe, self.digests)

    def _recipe(self, entry: Entry, rate: float) -> Recipe:
        """What a cell runs."""
        trainer = {**entry.recipe.trainer, **({"learning_rate": rate} if entry.rates else {})}
        output = str(entry_folder(self.comparison.output, entry))
        return dataclasses.replace(entry.recipe, trainer=trainer, output=output, seeds=(0,))

    def _train(self, entry: Entry, rate: float, seed: int, kind: Kind = "train") -> Run:
        folder, recipe = self.folder(entry, rate, seed), self._recipe(entry, rate)
        self._check(folder, recipe)
        try:
            if (folder / RESULTS).is_file():
                return Run(rate, seed, read_result(folder / RESULTS))
            name = f"{entry.label}, rate {rate:g}, seed {seed}" if entry.rates else entry.label
            result, problem = self._run(Cell(kind, name, recipe, seed, folder, self.options))
            return Run(rate, seed, result, problem)
        finally:
            self.bar.count()

    def _test(self, entry: Entry, run: Run) -> Run:
        if run.result is None or not self.has_tests or run.result.tests:
            return run
        recipe, folder = self._recipe(entry, run.rate), self.folder(entry, run.rate, run.seed)
        if not (folder / kept_folder(recipe)).is_dir():  # another rate was the best before
            (folder / RESULTS).unlink()
            self.bar.expect(1)
            run = self._train(entry, run.rate, run.seed)
            if run.result is None:
                return run
        name = f"{entry.label}, test, seed {run.seed}"
        result, problem = self._run(Cell("test", name, recipe, run.seed, folder, self.options))
        return Run(run.rate, run.seed, result, f"test: {problem}" if problem else "")

    def _run(self, cell: Cell) -> tuple[SeedResult | None, str]:
        """What a cell left in its folder; or None, and why it failed with the file that says more."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        failure = cell.folder / FAILURE
        failure.unlink(missing_ok=True)  # of an earlier call
        try:
            problem = self.engine.run(cell, self.bar)
        except LostCellError as error:
            problem = str(error)
        if not problem and not (cell.folder / RESULTS).is_file():
            problem = "it ended, but left nothing here: cells on several machines need one output folder that all see"
        if not problem:
            return read_result(cell.folder / RESULTS), ""
        if not failure.is_file():  # a process that died, or one that sees another disk, could not write it
            write_lines(failure, [problem])
        return None, f"{problem.splitlines()[0]} ({failure.relative_to(self.comparison.output)})"
