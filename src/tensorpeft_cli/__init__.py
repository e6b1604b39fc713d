"""The command ``tensorpeft``: parses, calls the package, prints. User errors are one line on stderr and exit code 2.

It is a package of its own because importing `tensorpeft` registers the methods with PEFT, which takes seconds. What is
imported here is the standard library; the package is imported within a command, after the options were checked.
"""

import argparse
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence

from tensorpeft_cli import autoload, chat, compare, demo, evaluate, export, inspect, plan, quantize, recipes, train
from tensorpeft_cli.errors import explain
from tensorpeft_cli.options import Parser
from tensorpeft_cli.package import one_line

# Each has a HELP, and add_options(parser), which sets run: a function of the arguments and the command line, that
# returns an exit code other than 0, or None.
COMMANDS = {
    "demo": demo,
    "train": train,
    "compare": compare,
    "chat": chat,
    "evaluate": evaluate,
    "plan": plan,
    "inspect": inspect,
    "quantize": quantize,
    "export": export,
    "recipes": recipes,
    "enable-autoload": autoload,
}


def run() -> int:
    """`main` of this process's command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal does not have must not end a command whose work is done.
            stream.reconfigure(errors="backslashreplace")
    return main(sys.argv[1:])


def main(argv: Sequence[str]) -> int:
    """Exit code of the command: 0, what the command says, 2 after a user error, 130 after Ctrl-C."""
    arguments = argparse.Namespace()
    try:
        arguments = _parse(argv)
        if arguments.cache is not None:
            os.environ["TENSORPEFT_CACHE"] = str(arguments.cache.absolute())
        code = arguments.run(arguments, shlex.join(["tensorpeft", *argv])) or 0
        sys.stdout.flush()
        return code
    except argparse.ArgumentError as error:
        name = " ".join(["tensorpeft", *argv[:1]] if argv and argv[0] in COMMANDS else ["tensorpeft"])
        return _fail(f"{error.argument_name or ''} {error.message.rstrip('.')}. See {name} --help.", 2)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)
    except BrokenPipeError:
        # Whoever read has read enough, as head does. What is still to be written at the exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = explain(error, arguments)
        if message is None:
            raise
        return _fail(message, 2)


def _fail(message: str, code: int) -> int:
    print("tensorpeft:", one_line(message), file=sys.stderr)
    return code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; `argparse.ArgumentError` where they are wrong."""
    parser = Parser(prog="tensorpeft", description="Fine-tune Hugging Face models with tensor-network adapters.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.HELP)
        # The options of the others are nobody's business: some look up what they say in the package's files.
        if argv[:1] == [name]:
            command.add_options(own)
    defaults = argparse.Namespace(extra="train", overrides=None, cache=None)
    arguments, rest = parser.parse_known_args(inspect.with_view(argv), defaults)
    if rest:
        # argparse takes the words of one list from one place only; KEY=VALUE may stand behind an option, too.
        if arguments.overrides is None or any(word.startswith("-") for word in rest):
            raise argparse.ArgumentError(None, f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides = [*arguments.overrides, *rest]
    for word in arguments.overrides or ():
        if not re.match(r"[^=\[\]]+=", word):
            raise argparse.ArgumentError(None, f"{word}: expected KEY=VALUE; a list is given whole: seeds=[0,1]")
    return arguments
