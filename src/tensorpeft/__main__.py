"""``python -m tensorpeft``: the command ``tensorpeft``, as launchers of several processes start it."""

import sys

from tensorpeft_cli import run

sys.exit(run())
