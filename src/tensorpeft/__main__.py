"""``python -m tensorpeft``: the command ``tensorpeft``."""

import sys

from tensorpeft.cli import main

sys.exit(main())
