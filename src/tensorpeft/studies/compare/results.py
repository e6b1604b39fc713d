"""What a comparison found: runs, costs, and a row per entry."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorpeft.studies.compare.entries import Comparison, Entry
from tensorpeft.studies.rates import RateWindow, rate_window
from tensorpeft.training.results import SeedResult, common_curves


@dataclass(frozen=True)
class Run:
    """One cell: an entry at one rate with one seed.

    Args:
        rate: learning rate.
        seed: of head, adapter, order of the rows.
        result: what it found; None: it failed.
        problem: why it failed.
    """

    rate: float
    seed: int
    result: SeedResult | None
    problem: str = ""

    @property
    def loss(self) -> float:
        """The validation loss of the kept checkpoint; infinite where the run failed or diverged."""
        loss = math.inf if self.result is None else self.result.validation.get("loss", math.inf)
        return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class EntryCosts:
    """What an entry costs. Zeros where nothing was measured.

    Args:
        parameters: trained, the new head apart.
        head_parameters: trained of the new head, the same for all entries.
        step_seconds: of a training step: the reference's median time, times the ratio; its own where there is none.
        ratio: of its median time to the reference's in the same rounds; 0: there is no reference.
        peak_bytes: largest memory of a training step above weights and optimiser state.
    """

    parameters: int
    head_parameters: int
    step_seconds: float = 0.0
    ratio: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class EntryResult:
    """A row of the comparison.

    Args:
        entry: which.
        search: a run per rate with the first seed, by rate.
        final: a run per seed at the best rate.
        costs: None: they could not be measured, or the entry failed before.
        saved_bytes: of what a run keeps, safetensors on disk.
        problem: why the entry has no result; "": it has.
    """

    entry: Entry
    search: tuple[Run, ...]
    final: tuple[Run, ...]
    costs: EntryCosts | None
    saved_bytes: int = 0
    problem: str = ""

    @property
    def rate(self) -> float:
        """The chosen learning rate."""
        return self.final[0].rate

    @property
    def finished_runs(self) -> list[Run]:
        """The final runs that did not fail."""
        return [run for run in self.final if run.result is not None]

    @property
    def finished(self) -> list[SeedResult]:
        """Their results."""
        return [run.result for run in self.final if run.result is not None]

    @property
    def has_failed(self) -> bool:
        """Whether the entry, its costs or one of its final runs failed; another rate of the search may have."""
        return bool(self.problem) or len(self.finished) < len(self.final)

    @property
    def chose_the_edge(self) -> bool:
        """Whether the chosen rate is the lowest or highest of several: a better one may lie outside."""
        return bool(self.final) and len(self.search) > 1 and self.rate in (self.search[0].rate, self.search[-1].rate)

    @property
    def window(self) -> RateWindow | None:
        """The rates whose loss is within 0.02 of the best one's; None: fewer than two were tried, or all failed."""
        return rate_window([(run.rate, run.loss) for run in self.search]) if len(self.search) > 1 else None

    def losses(self) -> list[float]:
        """The validation losses of the finished final runs."""
        return [run.loss for run in self.finished_runs]

    def behind(self, other: "EntryResult") -> list[float]:
        """By how much the loss is above another's, for each seed that both finished."""
        others = {run.seed: run.loss for run in other.final if run.result is not None}
        return [run.loss - others[run.seed] for run in self.final if run.result is not None and run.seed in others]

    def scores(self, test: str, metric: str) -> list[float]:
        """A metric of a test over the finished final runs."""
        return [result.tests[test][metric] for result in self.finished if test in result.tests]

    def mean_curve(self) -> list[tuple[int, float]]:
        """(step, validation loss), the mean over the finished final runs."""
        steps, curves = common_curves(self.finished, "eval_loss")
        return [(step, statistics.fmean(losses)) for step, losses in zip(steps, zip(*curves))]


def find_metrics(results: Sequence[EntryResult]) -> list[tuple[str, str]]:
    """(test, metric): the main metric of each test, in the order of the recipe."""
    tested = next((found.tests for result in results for found in result.finished if found.tests), {})
    return [(test, next(iter(metrics))) for test, metrics in tested.items()]


def is_loss(metric: str) -> bool:
    """Whether less of it is better."""
    return any(word in metric for word in ("loss", "perplexity", "bits"))


def mean_gain(result: EntryResult, untrained: EntryResult) -> float:
    """By how much the mean loss of the final runs is below that of the untrained model."""
    return untrained.losses()[0] - statistics.fmean(result.losses())


def common_loss(results: Sequence[EntryResult]) -> float | None:
    """The lowest loss that the mean curve of every entry reaches; None where there are no curves."""
    lowest = [min(loss for _, loss in curve) for result in results if (curve := result.mean_curve())]
    return max(lowest) if lowest else None


def steps_to(
    curve: Sequence[tuple[int, float]],  # (step, loss)
    target: float,
) -> float | None:
    """The step at which a curve first reaches a loss, between two evaluations by a straight line; None: it does not.

    >>> steps_to([(10, 2.0), (20, 1.0)], 1.5)
    15.0
    """
    for index, (step, loss) in enumerate(curve):
        if loss <= target:
            if index == 0:
                return float(step)
            earlier, above = curve[index - 1]
            return earlier + (step - earlier) * (above - target) / (above - loss)
    return None


def to_tree(comparison: Comparison, results: Sequence[EntryResult], versions: dict[str, str]) -> dict[str, Any]:
    """Everything as JSON types: raw numbers, no rounding."""
    return {
        "recipe": comparison.recipe.to_yaml(),
        "seeds": comparison.seeds,
        "budget": comparison.budget,
        "target_loss": comparison.target_loss,
        "versions": versions,
        "entries": [_entry_tree(result) for result in results],
    }


def _entry_tree(result: EntryResult) -> dict[str, Any]:
    return {
        "key": result.entry.key,
        "label": result.entry.label,
        "note": result.entry.note,
        "adapter": result.entry.recipe.adapter,
        "trainer": result.entry.recipe.trainer,
        "rates": result.entry.rates,
        "problem": result.problem,
        "chosen_rate": result.rate if result.final else None,
        "chosen_rate_is_at_the_edge": result.chose_the_edge,
        "rate_window": None if result.window is None else vars(result.window),
        # Not what is tested later: after an interruption the chosen run is found tested already.
        "search": [{**_run_tree(run), "tests": {}} for run in result.search],
        "final": [_run_tree(run) for run in result.final],
        "costs": None if result.costs is None else vars(result.costs),
        "saved_bytes": result.saved_bytes,
    }


def _run_tree(run: Run) -> dict[str, Any]:
    found = run.result
    return {
        "rate": run.rate,
        "seed": run.seed,
        "problem": run.problem,
        "validation": None if found is None else found.validation,
        "tests": None if found is None else found.tests,
        "versions": {} if found is None else found.versions,
        "curve": [] if found is None else found.curve("eval_loss"),
    }
