"""``tensorpeft evaluate``: load, evaluate, print a table, write the rows and the results."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from torch import nn

from tensorpeft.evaluation.evaluate import Evaluation, check_options, evaluate_task
from tensorpeft.evaluation.harness import run_lm_eval, table_rows
from tensorpeft.evaluation.mt_bench import MAX_NEW_TOKENS, answer_questions, as_answer_file, read_questions
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.report import metrics_table, write_evaluation
from tensorpeft.evaluation.tokens import device_of
from tensorpeft.loading.adapters import find_base, load_model
from tensorpeft.loading.quiet import quiet
from tensorpeft.reports.files import write_json, write_json_lines
from tensorpeft.reports.folders import sole_writer
from tensorpeft.reports.tables import Table
from tensorpeft.reports.terminal import make_progress, print_table, say
from tensorpeft.reports.versions import find_versions
from tensorpeft.tasks.sources import load_examples


def run_evaluate(
    model: str,  # name of a base, or of a saved adapter
    adapter: Path | None,  # of a saved adapter; ``model`` is then its base
    task: str,
    data: Any,  # as `load_examples` takes it
    options: EvaluationOptions,
    output: Path,  # folder, made where it does not exist
    rows: int | None = None,  # the first ones only; None: all
    dtype: str | None = None,  # of the model; None: as it was saved
    terminal: TextIO | None = None,  # None: standard output
) -> Evaluation:
    """The evaluation, after printing its metrics and writing predictions.jsonl and results.json.

    Raises:
        BlockingIOError: another evaluation writes to the output folder.
        FileNotFoundError: a file is missing.
        ValueError: task, data, options or model do not fit each other.
    """
    # Here, because it imports every task, and with them their libraries.
    from tensorpeft.tasks.registry import find_task

    if rows is not None and rows < 1:
        raise ValueError(f"rows={rows}: expected at least 1, or None for all.")
    console, found_task = Console(file=terminal), find_task(task)
    check_options(found_task, options)
    with sole_writer(output):
        examples = load_examples(found_task, data)[:rows]
        base, adapter_name = find_base(model, adapter)
        loaded, tokenizer = load_model(base, adapter_name, found_task, dtype)
        start = time.perf_counter()
        with quiet(), make_progress(console) as progress:
            bar = progress.add_task(f"evaluating {task}", total=len(examples))
            evaluation = evaluate_task(
                loaded, tokenizer, found_task, examples, options, lambda number: progress.advance(bar, number)
            )
        about = _about(loaded, base, adapter_name, seconds=time.perf_counter() - start)
        write_evaluation(evaluation, output, options, {**about, "data": data, "rows": rows})
        print_table(console, metrics_table(evaluation))
        say(console, f"Rows and results: {output}")
        return evaluation


def run_lm_eval_command(
    model: str,  # name of a base, or of a saved adapter
    adapter: Path | None,  # of a saved adapter; ``model`` is then its base
    tasks: Sequence[str],  # as lm-eval calls them
    output: Path,  # folder, made where it does not exist
    batch_size: int = 16,
    limit: int | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    dtype: str | None = None,
    terminal: TextIO | None = None,
) -> dict[str, Any]:
    """What lm-eval found, after printing its metrics and writing predictions.jsonl and results.json.

    Raises:
        BlockingIOError: another evaluation writes to the output folder.
        ImportError: lm-eval is not installed.
        ValueError: a task is unknown, or the adapter is for another base.
    """
    EvaluationOptions(batch_size=batch_size)  # says what is wrong with it
    console = Console(file=terminal)
    with sole_writer(output):
        base, adapter_name = find_base(model, adapter)
        loaded, tokenizer = load_model(base, adapter_name, task=None, dtype=dtype)
        start = time.perf_counter()
        with quiet():
            found = run_lm_eval(loaded, tokenizer, tasks, batch_size, limit, include_path, num_fewshot)
        about = _about(loaded, base, adapter_name, seconds=time.perf_counter() - start)
        samples = found.pop("samples", {})
        rows = ({"task": name, **row} for name, group in samples.items() for row in group)
        write_json_lines(output / "predictions.jsonl", rows)
        write_json(output / "results.json", {**found, **about, "libraries": find_versions()})
        print_table(console, Table("lm-eval", ("task", "metric", "value", "standard error"), table_rows(found)))
        say(console, f"Rows and results: {output}")
        return {**found, "samples": samples}


def run_mt_bench(
    model: str,  # name of a base, or of a saved adapter
    adapter: Path | None,  # of a saved adapter; ``model`` is then its base
    questions: Path,  # MT-Bench's question.jsonl
    output: Path,  # folder, made where it does not exist; its name is the model's to the judge
    batch_size: int = 16,
    max_new_tokens: int | None = None,  # None: FastChat's 1,024
    chat: bool = False,
    rows: int | None = None,  # the first questions only; None: all
    dtype: str | None = None,
    terminal: TextIO | None = None,
) -> list[list[str]]:
    """The answers to every question, after writing them as FastChat's judge reads them.

    Raises:
        BlockingIOError: another evaluation writes to the output folder.
        FileNotFoundError: there are no questions.
        ValueError: a question is malformed, or the model cannot answer it.
    """
    options = EvaluationOptions(batch_size=batch_size, max_new_tokens=max_new_tokens)  # says what is wrong with them
    console, asked = Console(file=terminal), read_questions(questions)[:rows]
    with sole_writer(output):
        base, adapter_name = find_base(model, adapter)
        loaded, tokenizer = load_model(base, adapter_name, task=None, dtype=dtype)
        with quiet(), make_progress(console) as progress:
            bar = progress.add_task("answering", total=sum(len(question.turns) for question in asked))
            answers = answer_questions(
                loaded,
                tokenizer,
                asked,
                batch_size,
                options.max_new_tokens or MAX_NEW_TOKENS,
                chat,
                on_turn=lambda number: progress.advance(bar, number),
            )
        file = output / f"{output.resolve().name}.jsonl"
        write_json_lines(file, as_answer_file(asked, answers, file.stem))
        say(console, f"Answers, for FastChat's data/mt_bench/model_answer: {file}")
        return answers


def _about(model: nn.Module, base: str, adapter: str | None, seconds: float) -> dict[str, Any]:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    device = str(device_of(model))
    return {"model": base, "adapter": adapter, "dtype": dtype, "device": device, "seconds": round(seconds, 3)}
