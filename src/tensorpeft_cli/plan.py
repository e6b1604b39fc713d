"""``tensorpeft plan``."""

import argparse
import re
from pathlib import Path

from tensorpeft_cli.options import (
    MODEL,
    add_cache,
    add_targets,
    method_keys,
    model_name,
    parse_budget,
    read_catalogue,
    targets_of,
    whole,
)
from tensorpeft_cli.package import import_package

HELP = "what every method would be on a model: parameters, files, memory, operations; from config.json alone"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Trained parameters, size of the file, memory of training and operations of every method on a model, counted "
        "on tensors without numbers. Only the model's config.json is read."
    )
    add = parser.add_argument
    add("model", type=model_name, metavar="MODEL", help=MODEL)
    add("--gpu", type=parse_size, metavar="SIZE", help="say what fits, such as 24GB")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=whole(1), metavar="R", help="of every method that has one (default: 16)")
    size.add_argument("--budget", metavar="N", help="trained parameters to come closest to, such as 1M, instead")
    add(
        "--methods",
        type=method_keys,
        metavar="A,B",
        help=f"only these (default: {', '.join(read_catalogue()['DEFAULT_PLANNED'])})",
    )
    add_targets(parser)
    add("--batch", type=whole(1), default=1, metavar="N", help="texts of a step (default: %(default)s)")
    add("--length", type=whole(1), default=512, metavar="N", help="tokens of a text (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="steps keep the inputs of blocks alone")
    add("--maps", action="store_true", help="print which weights form which tensor, with which modes")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add_cache(parser)
    parser.set_defaults(run=_run)


def parse_size(text: str) -> int:  # bytes
    """What argparse takes as `type`: `24GB`, `80 GiB` or `16G`. GPUs are named in GB and have GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*G(?:i?B)?\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a GPU's memory, such as 24GB.")
    return round(float(match[1]) * 2**30)


def _run(arguments: argparse.Namespace, command: str) -> None:
    budget = parse_budget(arguments.budget)
    read_catalogue()["choose_methods"](arguments.methods)
    import_package()
    from tensorpeft.studies.catalogue import choose_methods
    from tensorpeft.studies.plan_report import run_plan

    run_plan(
        arguments.model,
        gpu=arguments.gpu,
        json_file=arguments.json,
        with_maps=arguments.maps,
        methods=choose_methods(arguments.methods),
        rank=arguments.rank,
        budget=budget,
        targets=targets_of(arguments),
        batch=arguments.batch,
        length=arguments.length,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
