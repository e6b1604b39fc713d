"""``python -m tensorpeft``: the command ``tensorpeft``."""

import sys

from tensorpeft.cli import run

sys.exit(run())
