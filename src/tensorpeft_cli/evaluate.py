"""``tensorpeft evaluate``."""

import argparse
from pathlib import Path

from tensorpeft_cli.options import DTYPES, MODEL, add_cache, existing, model_name, positive, whole
from tensorpeft_cli.package import import_package

HELP = "score a model or an adapter on a task of the papers, or on lm-eval's"
# What each of the three ways looks at, of the options that others have not.
_LOOKS_AT = {
    "task": ("chat", "data", "mode", "max_length", "max_new_tokens", "num_beams", "beta"),
    "lm_eval": ("include_path", "few_shot"),
    "mt_bench": ("chat", "max_new_tokens"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = "Score a model, or a saved adapter with its base, on published test files."
    add = parser.add_argument
    add("model", type=model_name, metavar="MODEL", help=f"{MODEL}, or of a saved adapter")
    add("--base", type=model_name, metavar="MODEL", help="the base model, if it is not where the adapter says")
    add("--task", metavar="NAME", help="such as cola, boolq, gsm8k, squad, preferences")
    add("--data", metavar="FILE", help="published file of the task, or hub:NAME[:CONFIG]:SPLIT")
    add("--lm-eval", metavar="A,B", help="instead of --task: tasks of lm-eval")
    add("--mt-bench", type=existing, metavar="FILE", help="instead of --task: answer MT-Bench's question.jsonl")
    add("--include-path", type=existing, metavar="DIR", help="folder of further tasks for lm-eval")
    add("--few-shot", type=whole(0), metavar="N", help="examples before each row, for lm-eval")
    add("--mode", choices=("generate", "likelihood", "loss"), help="(default: what suits the task)")
    add("--chat", action="store_true", default=None, help="ask in the model's chat template (not for lm-eval)")
    add("--rows", type=whole(1), metavar="N", help="only the first N rows")
    add("--batch-size", type=whole(1), default=16, metavar="N", help="(default: %(default)s)")
    add("--max-length", type=whole(1), metavar="N", help="tokens of a row (default: the model's)")
    add("--max-new-tokens", type=whole(1), metavar="N", help="of an answer (default: the task's)")
    add("--num-beams", type=whole(1), metavar="N", help="(default: the task's)")
    add("--beta", type=positive, metavar="B", help="of the DPO loss (default: 0.1)")
    add("--dtype", choices=DTYPES, help="of the weights (default: as they were saved)")
    add("--output", type=Path, default=Path("runs/evaluate"), metavar="DIR", help="(default: %(default)s)")
    add_cache(parser)
    parser.set_defaults(run=_run, extra="train")


def _run(arguments: argparse.Namespace, command: str) -> None:
    source = _check(arguments)
    import_package()
    from tensorpeft.evaluation.options import EvaluationOptions
    from tensorpeft.evaluation.run import run_evaluate, run_lm_eval_command, run_mt_bench

    model, adapter = (arguments.model, None) if arguments.base is None else (arguments.base, Path(arguments.model))
    if arguments.lm_eval is not None:
        run_lm_eval_command(
            model,
            adapter,
            arguments.lm_eval.split(","),
            arguments.output,
            batch_size=arguments.batch_size,
            limit=arguments.rows,
            include_path=arguments.include_path,
            num_fewshot=arguments.few_shot,
            dtype=arguments.dtype,
        )
        return
    if arguments.mt_bench is not None:
        run_mt_bench(
            model,
            adapter,
            arguments.mt_bench,
            arguments.output,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            chat=bool(arguments.chat),
            rows=arguments.rows,
            dtype=arguments.dtype,
        )
        return
    options = EvaluationOptions(
        mode=arguments.mode,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        max_length=arguments.max_length,
        beta=0.1 if arguments.beta is None else arguments.beta,
        chat=bool(arguments.chat),
    )
    run_evaluate(
        model,
        adapter,
        arguments.task,
        source,
        options,
        arguments.output,
        rows=arguments.rows,
        dtype=arguments.dtype,
    )


def _check(arguments: argparse.Namespace) -> object:
    """The source of the rows, after refusing options that contradict each other."""
    given = [name for name in _LOOKS_AT if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ValueError("pass one of --task NAME, with --data FILE, --lm-eval NAMES and --mt-bench FILE.")
    others = {name for names in _LOOKS_AT.values() for name in names} - {*_LOOKS_AT[given[0]]}
    if useless := sorted(name for name in others if getattr(arguments, name) is not None):
        option, way = (f"--{name.replace('_', '-')}" for name in (useless[0], given[0]))
        raise ValueError(f"{option} changes nothing with {way}. Leave it out.")
    if arguments.task is not None and arguments.data is None:
        raise ValueError(
            f"--task {arguments.task}: on which rows? Pass a published file as --data FILE, the Hub's as --data "
            "hub:NAME:SPLIT, or what a task makes itself, such as --data sums:test."
        )
    return None if arguments.data is None else _source(arguments.data)


def _source(data: str) -> object:
    """A path, or the Hub's data set that hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT names."""
    if not data.startswith("hub:"):
        return data
    parts = data.split(":")[1:]
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(
            f"--data {data}: expected hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT, such as hub:nyu-mll/glue:cola:test."
        )
    return {"hub": parts[0], "split": parts[-1]} | ({"name": parts[1]} if len(parts) == 3 else {})
