"""``tensorpeft train``."""

import argparse

from tensorpeft_cli.options import add_cache, add_recipe, find_recipe
from tensorpeft_cli.package import import_package

HELP = "fine-tune a model as a recipe says: any adapter, any data, transformers' and TRL's trainers"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Fine-tune as a YAML recipe says; write checkpoints, the best adapter, a report and curves. "
        "Under `accelerate launch -m tensorpeft train ...` on several processes."
    )
    add_recipe(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    add_cache(parser)
    parser.set_defaults(run=_run, extra="train")


def _run(arguments: argparse.Namespace, command: str) -> None:
    find_recipe(arguments.recipe)
    import_package()
    from accelerate import PartialState

    from tensorpeft.training.recipe import load_recipe
    from tensorpeft.training.run import run_training

    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.smoke)
    run_training(recipe, arguments.resume, command)
    # Left to the interpreter's end, threads of several processes' group now and then abort it (pytorch issue 190489).
    PartialState().destroy_process_group()
