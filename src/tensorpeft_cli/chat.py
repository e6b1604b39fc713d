"""``tensorpeft chat``."""

import argparse

from tensorpeft_cli.options import DTYPES, add_cache, model_name, positive, whole
from tensorpeft_cli.package import import_package

HELP = "talk to a saved adapter and to its base, side by side"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = "Ask; base and adapter answer next to each other. In a pipe: a question a line."
    parser.add_argument(
        "adapter", type=model_name, metavar="ADAPTER", help="folder or Hub name of a saved adapter of a language model"
    )
    parser.add_argument("--base", type=model_name, metavar="MODEL", help="if it is not where the adapter says")
    parser.add_argument("--system", metavar="TEXT", help="first message of every conversation")
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        metavar="N",
        help="of an answer (default: 256, or half of what a short model reads)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they were saved)")
    parser.add_argument(
        "--sample", type=positive, metavar="TEMPERATURE", help="draw tokens (default: the likeliest, always)"
    )
    add_cache(parser)
    parser.set_defaults(run=_run, extra="train")


def _run(arguments: argparse.Namespace, command: str) -> None:
    import_package()
    from tensorpeft.evaluation.chat import run_chat

    run_chat(
        arguments.adapter,
        arguments.base,
        arguments.max_new_tokens,
        arguments.system,
        arguments.dtype,
        arguments.sample,
    )
