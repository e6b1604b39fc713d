"""What a training run leaves behind, in memory and as JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorpeft.reports.files import write_lines


@dataclass(frozen=True)
class SeedResult:
    """The run of one seed.

    Args:
        seed: of head, adapter, order of the rows, dropout.
        history: what the trainer logged: ``step``, ``loss``, ``eval_loss``, ``learning_rate``, …
        validation: metrics of the kept checkpoint on the validation rows; ``loss`` is one of them.
        best_step: of the kept checkpoint; None: the last one is kept.
        steps: all optimiser steps.
        tests: metrics by name of the test.
        trained_parameters: how many numbers were trained.
        all_parameters: how many the model has.
        versions: of the libraries that it was found with; none: it is older than the record of them.
    """

    seed: int
    history: tuple[Mapping[str, float], ...]
    validation: Mapping[str, float]
    best_step: int | None
    steps: int
    tests: Mapping[str, Mapping[str, float]]
    trained_parameters: int
    all_parameters: int
    versions: Mapping[str, str] = field(default_factory=dict)

    def curve(self, key: str) -> list[tuple[int, float]]:
        """The (step, value) of everything logged under a key; one per step, the latest."""
        points = {int(entry["step"]): entry[key] for entry in self.history if key in entry}
        return sorted((step, value) for step, value in points.items() if math.isfinite(value))

    def write(self, path: Path) -> None:
        """Write JSON; a file that is there is always whole."""
        # Not `write_json`: a loss that diverged is read again, and has to be the same.
        write_lines(path, [json.dumps(dataclasses.asdict(self), indent=1, default=float)])


def common_curves(
    results: Sequence[SeedResult], key: str
) -> tuple[list[int], list[list[float]]]:  # (points,), and per run (points,)
    """The steps at which all runs logged a key, and every run's values there."""
    curves = [dict(result.curve(key)) for result in results]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return steps, [[curve[step] for step in steps] for curve in curves]


def read_result(path: Path) -> SeedResult:
    """The result in a JSON file that `SeedResult.write` wrote."""
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return SeedResult(**{**tree, "history": tuple(tree["history"])})
