"""What ``tensorpeft demo`` found, before it is a table, a plot, a report or JSON."""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from tensorpeft.studies.costs import Costs
from tensorpeft.studies.demo_methods import Method
from tensorpeft.studies.finetune import Recipe
from tensorpeft.tasks.classification import ClassificationTask


@dataclass(frozen=True)
class Run:
    """One fine-tuning run.

    Args:
        rate: learning rate.
        seed: of the head, the adapter's start and the order of the rows.
        curve: (step, validation loss), ascending; the last one is after the last step.
        scores: the task's metrics on the test split; None for a run that only helped to choose the rate.
    """

    rate: float
    seed: int
    curve: tuple[tuple[int, float], ...]
    scores: dict[str, float] | None = None

    @property
    def validation_loss(self) -> float:
        """The loss after the last step; infinite where training diverged, so that it is never the best."""
        loss = self.curve[-1][1]
        return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class MethodResult:
    """All runs of a method, and its costs.

    Args:
        method: what was run.
        search: one run per rate tried, rates ascending, with the first seed.
        final: one run per seed, at the chosen rate; the first is the search's own.
        costs: parameters, bytes and seconds.
    """

    method: Method
    search: tuple[Run, ...]
    final: tuple[Run, ...]
    costs: Costs

    @property
    def rate(self) -> float:
        """The learning rate with the lowest validation loss."""
        return self.final[0].rate

    @property
    def chose_the_edge(self) -> bool:
        """Whether the chosen rate is the smallest or largest that was tried: a better one may lie outside."""
        return self.rate in (self.search[0].rate, self.search[-1].rate)

    @property
    def step_seconds(self) -> float:
        """The median time of a training step."""
        return statistics.median(self.costs.step_seconds)


@dataclass(frozen=True)
class Study:
    """A finished demo.

    Args:
        task: the rows that were used, splits cut as the plan says.
        recipe: how every run trained.
        num_seeds: seeds of the final runs, counted from 0.
        timed_batch: shape (rows, tokens) of the batch on which the costs were measured.
        results: one per method.
        versions: library -> version.
        threads: CPU threads that torch used.
        command: what the user typed.
        note: what a reader must know before comparing the methods.
    """

    task: ClassificationTask
    recipe: Recipe
    num_seeds: int
    timed_batch: tuple[int, int]
    results: tuple[MethodResult, ...]
    versions: dict[str, str]
    threads: int
    command: str
    note: str = ""

    def majority_share(self) -> float:
        """The share of the test split's most frequent class: the accuracy of always answering it."""
        labels = self.task.test.labels
        return max(labels.count(label) for label in set(labels)) / len(labels)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types: raw numbers, no rounding."""
        task = self.task
        splits = {"train": task.train, "validation": task.validation, "test": task.test}
        return {
            "command": self.command,
            "note": self.note,
            "task": {
                "name": task.name,
                "labels": list(task.label_names),
                "rows": {name: len(split) for name, split in splits.items()},
                "majority_share_of_test": self.majority_share(),
            },
            "recipe": asdict(self.recipe),
            "num_seeds": self.num_seeds,
            "timed_batch": list(self.timed_batch),
            "versions": self.versions,
            "threads": self.threads,
            "methods": [_result_to_json(result) for result in self.results],
        }


def _result_to_json(result: MethodResult) -> dict[str, Any]:
    costs = asdict(result.costs)
    return {
        "key": result.method.key,
        "name": result.method.name,
        "rates": list(result.method.rates),
        "chosen_rate": result.rate,
        "chosen_rate_is_at_the_edge": result.chose_the_edge,
        "search": [asdict(run) for run in result.search],
        "final": [asdict(run) for run in result.final],
        "trainable_parameters": result.costs.head_parameters + result.costs.other_parameters,
        "median_step_seconds": result.step_seconds,
        **costs,
    }
