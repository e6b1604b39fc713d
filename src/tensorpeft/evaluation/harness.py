"""The standard tasks of EleutherAI's lm-evaluation-harness, on a model that is in memory, adapters included."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase


def run_lm_eval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int,
    limit: int | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns, "samples" included. It seeds the global random number generators.

    Args:
        model: a causal language model, of transformers or PEFT; left in evaluation mode.
        tokenizer: its tokenizer; one without a padding token is given one.
        tasks: names of tasks or groups, as ``lm-eval ls tasks`` lists them.
        batch_size: requests of a forward pass.
        limit: only the first rows of every task; None: all.
        include_path: a folder with tasks of one's own, in YAML.
        num_fewshot: solved examples before every question; None: what the task says.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a task is unknown.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ImportError(f'standard tasks need lm-eval ({error}). Run: pip install "lm-eval>=0.4.9"') from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}. See: lm-eval ls tasks, or pass the folder of your own.")
    log = logging.getLogger("lm_eval")
    level = log.level
    # It warns of every model that it did not load itself.
    log.setLevel(logging.ERROR)
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # pyright: ignore
        found = simple_evaluate(wrapped, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager)
    finally:
        log.setLevel(level)
    assert found is not None  # None on all but the first of several processes
    return dict(found)


def table_rows(
    found: dict[str, Any],  # of `run_lm_eval`
) -> list[list[str]]:  # task, metric, value, standard error
    """The metrics, in lm-eval's order."""
    rows = []
    for task, metrics in found["results"].items():
        name = str(metrics.get("alias", task))
        for key, value in metrics.items():
            metric, _, rule = key.partition(",")
            if not isinstance(value, int | float) or not rule or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{rule}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else ""
            rows.append([name, metric if rule == "none" else f"{metric}, {rule}", f"{value:.4f}", shown])
            name = ""
    return rows
