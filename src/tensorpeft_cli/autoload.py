"""``tensorpeft enable-autoload``: PEFT knows our methods in every process of this environment."""

import argparse
import os
import sysconfig
from pathlib import Path

HELP = "let PEFT load our adapters without `import tensorpeft`, in this environment"
FILE = "tensorpeft-autoload.pth"
# Python runs it at every start. Where the package is gone it does nothing.
LINE = 'import importlib.util as u; u.find_spec("tensorpeft_autoload") and __import__("tensorpeft_autoload")\n'


def add_options(parser: argparse.ArgumentParser) -> None:
    """Whether to undo it."""
    parser.description = (
        "Write a .pth file into this Python environment that imports tensorpeft whenever PEFT is imported: "
        "PeftModel.from_pretrained then loads our adapters in programs that have never heard of us."
    )
    parser.add_argument("--remove", action="store_true", help="remove the file again")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, command: str) -> None:
    file = Path(sysconfig.get_path("purelib")) / FILE
    if arguments.remove:
        was_there = file.exists()
        file.unlink(missing_ok=True)
        print(f"Removed {file}" if was_there else f"There is no {file}")
        return
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(LINE, encoding="utf-8")
    os.replace(unfinished, file)
    print(
        f"Written: {file}\nIn this environment `import peft` imports tensorpeft, too, from now on. --remove undoes it."
    )
