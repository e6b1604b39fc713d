"""The command ``tensorpeft``: parses, calls the studies, prints. User errors are one line on stderr and exit code 2."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command: 0, or 2 after a user error."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments, shlex.join(["tensorpeft", *argv]))
    except (ValueError, FileNotFoundError) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f'{error}. The demo needs more libraries than the package. Run: pip install "tensorpeft[demo]"')
    except ImportError as error:
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
    demo.add_argument("--methods", metavar="A,B", help="of full, lora, dota, dota-random, lorta, lotr (default: all)")
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
        description="Write a saved adapter as a plain LoRA. Exact for LoRTA, LoTR and FacT; DoTA is cut to --rank.",
    )
    lora.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the saved adapter")
    lora.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    lora.add_argument("--rank", type=int, metavar="R", help="for an update of high rank: what it is cut to")
    lora.set_defaults(run=_export_lora)
    return parser


def _demo(arguments: argparse.Namespace, command: str) -> None:
    # Imported here: these take seconds and optional libraries, and --help needs neither.
    from tensorpeft.studies.demo import make_plan, run_demo
    from tensorpeft.studies.demo_methods import choose_methods

    plan = make_plan(arguments.quick, arguments.steps, arguments.seeds, arguments.task)
    methods = choose_methods(arguments.methods, plan.rate_scale)
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
