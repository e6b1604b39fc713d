"""An evaluation as a table and as files."""

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

import tensorpeft
from tensorpeft.evaluation.evaluate import Evaluation
from tensorpeft.evaluation.options import EvaluationOptions

# Larger numbers, of perplexities, are written in powers of ten.
_LARGEST_FIXED = 1e5


def metrics_table(evaluation: Evaluation) -> Group:
    """The metrics, a row each, and below what was cut or left out."""
    notes = []
    if evaluation.num_cut:
        notes.append(f"{evaluation.num_cut:,} of {evaluation.num_rows:,} rows were cut (max_length).")
    if evaluation.num_left_out:
        notes.append(f"{evaluation.num_left_out:,} of them: no response left, and in no metric.")
    rows = [[name, format_number(value)] for name, value in evaluation.metrics.items()]
    title = f"{evaluation.task}: {evaluation.mode}, {evaluation.num_rows:,} rows"
    return make_table(title, ("metric", "value"), rows, notes)


def make_table(
    title: str,
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    notes: Sequence[str] = (),
) -> Group:
    """Title, table and notes. The first column is text, the others are numbers, which are never wrapped."""
    # Not the table's own title and caption, which would be as narrow as its columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right", no_wrap=index > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return Group(title, table, *notes)


def format_number(value: float) -> str:
    """Four decimals, or four digits of a number that would be long."""
    return f"{value:.4f}" if abs(value) < _LARGEST_FIXED else f"{value:.4g}"


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    options: EvaluationOptions,
    about: Mapping[str, Any],  # what else is known, such as the model and the source of the data
) -> None:
    """Write predictions.jsonl, a row per example, and results.json, each of them whole or not at all."""
    write_lines(folder / "predictions.jsonl", map(to_json, evaluation.rows))
    results = {
        "task": evaluation.task,
        "mode": evaluation.mode,
        "num_rows": evaluation.num_rows,
        "num_cut": evaluation.num_cut,
        "num_left_out": evaluation.num_left_out,
        "metrics": evaluation.metrics,
        "options": asdict(options),
        **about,
        "versions": find_versions(),
    }
    write_lines(folder / "results.json", [to_json(results, indent=1)])


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON in which a number that is none, or is infinite, is null, and what is no JSON is written as text."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file; on failure an older one stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def find_versions() -> dict[str, str]:
    """Versions of what a result depends on, as far as it is installed."""
    found = {"python": platform.python_version(), "tensorpeft": tensorpeft.__version__}
    for library in ("torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "datasets", "lm_eval"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
