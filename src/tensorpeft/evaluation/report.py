"""An evaluation as a table and as files."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensorpeft.evaluation.evaluate import Evaluation
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.reports.files import write_json, write_json_lines
from tensorpeft.reports.tables import Table, format_number
from tensorpeft.reports.versions import find_versions


def metrics_table(evaluation: Evaluation) -> Table:
    """The metrics, a row each, and below what was cut or left out."""
    notes = []
    if evaluation.num_cut:
        notes.append(f"{evaluation.num_cut:,} of {evaluation.num_rows:,} rows were cut (max_length).")
    if evaluation.num_left_out:
        notes.append(f"{evaluation.num_left_out:,} of them: no response left, and in no metric.")
    rows = [[name, format_number(value)] for name, value in evaluation.metrics.items()]
    title = f"{evaluation.task}: {evaluation.mode}, {evaluation.num_rows:,} rows"
    return Table(title, ("metric", "value"), rows, notes)


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    options: EvaluationOptions,
    about: Mapping[str, Any],  # what else is known, such as the model and the source of the data
) -> None:
    """Write predictions.jsonl, a row per example, and results.json, each of them whole or not at all."""
    write_json_lines(folder / "predictions.jsonl", evaluation.rows)
    names = ("task", "mode", "num_rows", "num_cut", "num_left_out", "metrics")
    results = {name: getattr(evaluation, name) for name in names}
    write_json(folder / "results.json", {**results, "options": asdict(options), **about, "versions": find_versions()})
