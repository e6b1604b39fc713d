"""The command ``tensorpeft``: parses, calls the studies, prints. User errors are one line on stderr and exit code 2."""

import argparse
import gc
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tensorpeft.cli_inspect import add_inspect, with_view
from tensorpeft.cli_options import add_double_quant, add_network, add_targets, network_of, targets_of

_DTYPES = ("bfloat16", "float16", "float32")


def run() -> int:
    """`main` in a process of its own.

    What is imported by now, torch and transformers, is never garbage: no collection looks at it any more, not even the
    one at the exit, which would take a second.
    """
    gc.freeze()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command: 0, or 2 after a user error."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    arguments, rest = parser.parse_known_args(with_view(argv), argparse.Namespace(extra="demo", overrides=None))
    if rest:
        # argparse takes the words of one list from one place only; KEY=VALUE may stand behind an option, too.
        if arguments.overrides is None or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    try:
        arguments.run(arguments, shlex.join(["tensorpeft", *argv]))
    except ValueError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        extra = {"bitsandbytes": "4bit", "lm_eval": "eval"}.get(str(error.name), arguments.extra)
        return _fail(
            f'{error}. This command needs more libraries than the package. Run: pip install "tensorpeft[{extra}]"'
        )
    except (ImportError, OSError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print("tensorpeft:", " ".join(message.split()), file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tensorpeft", description="Fine-tune Hugging Face models with tensor-network adapters."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="compare full fine-tuning, LoRA, DoTA, LoRTA and LoTR on a small task, on this machine",
        description="Fine-tune MiniLM-L6 with several methods; print a table, write a report, a plot and raw results.",
    )
    demo.add_argument(
        "--task",
        choices=("docstrings", "cola"),
        default="docstrings",
        help="docstrings of Python's standard library by area (default), or GLUE's CoLA (needs --data)",
    )
    demo.add_argument("--data", type=Path, metavar="DIR", help="folder of CoLA's train.tsv and dev.tsv")
    demo.add_argument(
        "--methods",
        metavar="A,B",
        help="of full, lora, dota, dota-random, lorta, lotr (these by default), loretta, loretta-adapter, flora, nola, "
        "quanta, lora-fa, pissa, dora, vera, ia3, qlora, qdota",
    )
    demo.add_argument("--all", action="store_true", help="every method")
    demo.add_argument("--quick", action="store_true", help="few steps, rows and seeds: shows that it runs, no more")
    demo.add_argument("--seeds", type=int, metavar="N", help="final runs per method (default: 3; quick: 2)")
    demo.add_argument(
        "--steps", type=int, metavar="N", help="training steps of a run (default: 60, CoLA 400; quick: 8)"
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where the report goes (default: %(default)s)",
    )
    demo.set_defaults(run=_demo)
    export = commands.add_parser("export", help="write an adapter in a form that other libraries read")
    forms = export.add_subparsers(title="forms", required=True, metavar="FORM")
    lora = forms.add_parser(
        "lora",
        help="a plain LoRA checkpoint, for PEFT, vLLM, SGLang and llama.cpp",
        description="Write a saved adapter as a plain LoRA. Exact, but for DoTA and QuanTA, which are cut to --rank.",
    )
    lora.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the saved adapter")
    lora.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    lora.add_argument("--rank", type=int, metavar="R", help="for an update of high rank: what it is cut to")
    lora.set_defaults(run=_export_lora)
    dense = forms.add_parser(
        "dense",
        help="adapter and base as one plain model in 16 or 32 bits",
        description="Merge a saved adapter into its base model, 4-bit weights dequantised first, and save the model.",
    )
    dense.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the saved adapter")
    dense.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    dense.add_argument("--base", metavar="MODEL", help="the base model, if it is not where the adapter says")
    dense.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the weights (default: %(default)s)")
    dense.set_defaults(run=_export_dense)
    _add_train(commands)
    _add_compare(commands)
    _add_evaluate(commands)
    plan = commands.add_parser(
        "plan",
        help="what every method would be on a model: parameters, files, memory, operations; from config.json alone",
        description="Trained parameters, size of the file, memory of training and operations of every method on a "
        "model, counted on tensors without numbers. Only the model's config.json is read.",
    )
    plan.add_argument("model", metavar="MODEL", help="folder or Hub name of a model")
    plan.add_argument("--gpu", metavar="SIZE", help="say what fits, such as 24GB")
    plan.add_argument("--rank", type=int, metavar="R", help="of every method that has one (default: 16)")
    plan.add_argument("--budget", metavar="N", help="trained parameters to come closest to, such as 1M, instead")
    plan.add_argument("--methods", metavar="A,B", help="only these (default: all)")
    add_targets(plan)
    plan.add_argument("--batch", type=int, default=1, metavar="N", help="texts of a step (default: %(default)s)")
    plan.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a text (default: %(default)s)")
    plan.add_argument("--gradient-checkpointing", action="store_true", help="steps keep the inputs of blocks alone")
    plan.add_argument("--maps", action="store_true", help="print which weights form which tensor, with which modes")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    plan.set_defaults(run=_plan)
    quantize = commands.add_parser(
        "quantize",
        help="write QDoTA's base: a checkpoint in 4 bits, with the start of the adapter kept apart",
        description="Quantise a safetensors checkpoint to NF4 residuals and cores, one weight in memory at a time. "
        "Interrupted, the same command goes on where it stopped.",
    )
    quantize.add_argument("model", metavar="MODEL", help="folder or Hub name of a checkpoint in 16 or 32 bits")
    quantize.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    add_network(quantize)
    add_double_quant(quantize)
    quantize.add_argument(
        "--rounds", type=int, default=1, metavar="K", help="of decomposition and quantisation (default: 1)"
    )
    quantize.add_argument("--compute-dtype", choices=_DTYPES, help="what products run in (default: the input's dtype)")
    quantize.add_argument(
        "--skip", nargs="+", default=(), metavar="NAME", help="further linear layers to leave as they are"
    )
    quantize.set_defaults(run=_quantize)
    add_inspect(commands)
    return parser


def _add_train(commands) -> None:  # commands: what add_subparsers returns
    train = commands.add_parser(
        "train",
        help="fine-tune a model as a recipe says: any adapter, any data, transformers' and TRL's trainers",
        description="Fine-tune as a YAML recipe says; write checkpoints, the best adapter, a report and curves. "
        "Under `accelerate launch -m tensorpeft train ...` on several processes.",
    )
    train.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as those in recipes/")
    train.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as trainer.learning_rate=1e-3 seeds=[0,1]"
    )
    train.add_argument("--smoke", action="store_true", help="the recipe's small version: shows that it runs, no more")
    train.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    train.set_defaults(run=_train, extra="train")


def _add_compare(commands) -> None:  # commands: what add_subparsers returns
    compare = commands.add_parser(
        "compare",
        help="several methods on one recipe: the same data, model and steps, each at its own best learning rate",
        description="Run a recipe with several methods and seeds; print a table, write a report (HTML), plots and raw "
        "results. Called again, it goes on: finished cells are not run again.",
    )
    compare.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as recipes/demo.yaml")
    compare.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, as in tensorpeft train")
    compare.add_argument(
        "--methods",
        metavar="A,B",
        help="of the recipe's, or full, lora, dota, dota-random, lorta, lotr (these by default), fact-tt, fact-tk, "
        "loretta, loretta-adapter, flora, nola, quanta, dora, rslora, pissa, vera, ia3",
    )
    compare.add_argument("--seeds", type=int, metavar="N", help="final runs per method (default: the recipe's, or 3)")
    compare.add_argument("--budget", metavar="N", help="equal size: ranks that come closest to it, such as 50k")
    compare.add_argument(
        "--target-loss", type=float, metavar="L", help="for the time to a loss (default: all reach it)"
    )
    compare.add_argument(
        "--timing-rounds", type=int, default=7, metavar="N", help="timed steps; 0: time nothing (default: %(default)s)"
    )
    compare.add_argument("--smoke", action="store_true", help="the recipe's small version: shows that it runs, no more")
    compare.add_argument("--output", type=Path, metavar="DIR", help="(default: the recipe's, or runs/compare/RECIPE)")
    compare.set_defaults(run=_compare, extra="train")


def _add_evaluate(commands) -> None:  # commands: what add_subparsers returns
    evaluate = commands.add_parser(
        "evaluate",
        help="score a model or an adapter on a task of the papers, or on lm-eval's",
        description="Score a model, or a saved adapter with its base, on published test files.",
    )
    evaluate.add_argument("model", metavar="MODEL", help="folder or Hub name of a model, or of a saved adapter")
    evaluate.add_argument("--base", metavar="MODEL", help="the base model, if it is not where the adapter says")
    evaluate.add_argument("--task", metavar="NAME", help="such as cola, boolq, gsm8k, squad, preferences")
    evaluate.add_argument("--data", metavar="FILE", help="published file of the task, or hub:NAME[:CONFIG]:SPLIT")
    evaluate.add_argument("--lm-eval", metavar="A,B", help="instead of --task: tasks of lm-eval")
    evaluate.add_argument("--include-path", type=Path, metavar="DIR", help="folder of further tasks for lm-eval")
    evaluate.add_argument("--few-shot", type=int, metavar="N", help="examples before each row, for lm-eval")
    evaluate.add_argument("--mode", choices=("generate", "likelihood", "loss"), help="(default: what suits the task)")
    evaluate.add_argument("--chat", action="store_true", help="ask questions in the model's chat template")
    evaluate.add_argument("--rows", type=int, metavar="N", help="only the first N rows")
    evaluate.add_argument("--batch-size", type=int, default=16, metavar="N", help="(default: %(default)s)")
    evaluate.add_argument("--max-length", type=int, metavar="N", help="tokens of a row (default: the model's)")
    evaluate.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: the task's)")
    evaluate.add_argument("--num-beams", type=int, metavar="N", help="(default: the task's)")
    evaluate.add_argument("--beta", type=float, default=0.1, help="of the DPO loss (default: %(default)s)")
    evaluate.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as they were saved)")
    evaluate.add_argument(
        "--output", type=Path, default=Path("runs/evaluate"), metavar="DIR", help="(default: %(default)s)"
    )
    evaluate.set_defaults(run=_evaluate, extra="train")


def _train(arguments: argparse.Namespace, command: str) -> None:
    from tensorpeft.training.recipe import load_recipe
    from tensorpeft.training.run import run_training

    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.smoke)
    run_training(recipe, arguments.resume, command)


def _compare(arguments: argparse.Namespace, command: str) -> None:
    from tensorpeft.studies.budget import parse_count
    from tensorpeft.studies.compare.entries import load_entries
    from tensorpeft.studies.compare.run import run_compare

    if arguments.timing_rounds < 0:
        raise ValueError(f"--timing-rounds {arguments.timing_rounds}: expected 0 or more.")
    comparison = load_entries(
        arguments.recipe,
        arguments.methods,
        arguments.seeds,
        arguments.overrides,
        arguments.smoke,
        arguments.output,
        None if arguments.budget is None else parse_count(arguments.budget),
        arguments.target_loss,
    )
    run_compare(comparison, arguments.timing_rounds, command)


def _evaluate(arguments: argparse.Namespace, command: str) -> None:
    from tensorpeft.evaluation.options import EvaluationOptions
    from tensorpeft.evaluation.run import run_evaluate, run_lm_eval_command

    if (arguments.task is None) == (arguments.lm_eval is None):
        raise ValueError("pass one of --task NAME, with --data FILE, and --lm-eval NAMES.")
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
    if arguments.data is None:
        raise ValueError(
            f"--task {arguments.task}: the data is not in the package. Pass a published file as --data FILE."
        )
    options = EvaluationOptions(
        mode=arguments.mode,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        max_length=arguments.max_length,
        beta=arguments.beta,
        chat=arguments.chat,
    )
    run_evaluate(
        model,
        adapter,
        arguments.task,
        _source(arguments.data),
        options,
        arguments.output,
        rows=arguments.rows,
        dtype=arguments.dtype,
    )


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


def _plan(arguments: argparse.Namespace, command: str) -> None:
    from tensorpeft.studies.budget import parse_count
    from tensorpeft.studies.plan import choose_methods
    from tensorpeft.studies.plan_report import parse_size, run_plan

    run_plan(
        arguments.model,
        gpu=None if arguments.gpu is None else parse_size(arguments.gpu),
        json_file=arguments.json,
        with_maps=arguments.maps,
        methods=choose_methods(arguments.methods),
        rank=arguments.rank,
        budget=None if arguments.budget is None else parse_count(arguments.budget),
        targets=targets_of(arguments),
        batch=arguments.batch,
        length=arguments.length,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )


def _quantize(arguments: argparse.Namespace, command: str) -> None:
    import torch

    from tensorpeft.quantization.streamed import quantize_checkpoint

    dtype = None if arguments.compute_dtype is None else getattr(torch, arguments.compute_dtype)
    config = network_of(arguments)
    quantize_checkpoint(
        arguments.model,
        arguments.out,
        config,
        arguments.rounds,
        not arguments.no_double_quant,
        dtype,
        arguments.skip,
        progress=True,
    )
    print(
        f"Residual base written to {arguments.out}. After `import tensorpeft`, from_pretrained loads it; adapt it with"
    )
    targets = sorted(config.target_modules) if isinstance(config.target_modules, set) else config.target_modules
    print(f"DotaConfig(r={config.r}, num_cores={config.num_cores}, target_modules={targets!r})")


def _export_dense(arguments: argparse.Namespace, command: str) -> None:
    import torch

    from tensorpeft.export import to_dense

    to_dense(arguments.adapter, arguments.out, getattr(torch, arguments.dtype), arguments.base)
    print(f"Merged model in {arguments.dtype} written to {arguments.out}")


def _demo(arguments: argparse.Namespace, command: str) -> None:
    # Imported here: these take seconds and optional libraries, and --help needs neither.
    from tensorpeft.studies.demo import make_plan, run_demo
    from tensorpeft.studies.demo_methods import choose_methods

    plan = make_plan(arguments.quick, arguments.steps, arguments.seeds, arguments.task)
    if arguments.all and arguments.methods:
        raise ValueError(f"--all and --methods {arguments.methods}: pass one of the two.")
    methods = choose_methods("all" if arguments.all else arguments.methods, plan.rate_scale)
    run_demo(_load_task(arguments.task, arguments.data), plan, methods, arguments.output, command)


def _export_lora(arguments: argparse.Namespace, command: str) -> None:
    from tensorpeft.export import to_lora

    layers = to_lora(arguments.adapter, arguments.out, arguments.rank, progress=True)
    if any(layer.error > 0 for layer in layers):
        width = max(len(layer.name) for layer in layers)
        print(f"{'layer':{width}s}  |ΔW - BA| / |ΔW|")
        for layer in layers:
            print(f"{layer.name:{width}s}  {layer.error:.1%}")
    print(f"{len(layers)} layers written to {arguments.out}")


def _load_task(name: str, data: Path | None):  # -> ClassificationTask
    from tensorpeft.tasks.cola import load_cola
    from tensorpeft.tasks.docstrings import load_docstrings

    if name == "docstrings":
        if data is not None:
            raise ValueError(f"--data {data}: the docstrings task reads this Python's own library. Leave --data out.")
        return load_docstrings()
    if data is None:
        raise ValueError("--task cola: the data is not in the package. Pass its folder as --data DIR.")
    return load_cola(data)
