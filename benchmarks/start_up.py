"""How long `tensorpeft` takes to answer with its help or with what is wrong in a command line.

Prints the median of five starts of a process each, and of one that does nothing: what Python itself takes.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 5
PYTHON = [sys.executable, "-c", "pass"]
COMMAND = [sys.executable, "-c", "import sys; from tensorpeft_cli import run; sys.exit(run())"]
COMMANDS = ("demo", "train", "compare", "evaluate", "plan", "inspect bonds", "quantize", "export lora", "recipes")
LINES = [
    "--help",
    *(f"{command} --help" for command in COMMANDS),
    "no-such-command",
    "train no-such-recipe",
    "compare demo --seeds 0",
    "compare demo --budget 5x",
    "evaluate model",
    "plan model --gpu huge",
    "plan model --methods sora",
    "plan /no/such/folder",
    "export lora no-such-adapter out",
]


def main() -> None:
    """Time every line, one after the other; the rounds go over all lines."""
    starts = [PYTHON, *([*COMMAND, *line.split()] for line in LINES)]
    seconds: list[list[float]] = [[] for _ in starts]
    for _ in range(ROUNDS):
        for command, found in zip(starts, seconds):
            begin = time.perf_counter()
            subprocess.run(command, capture_output=True)
            found.append(time.perf_counter() - begin)
    print("| command | seconds, median of 5 |\n| --- | --- |")
    for name, found in zip(["Python alone", *(f"tensorpeft {line}" for line in LINES)], seconds):
        print(f"| {name} | {statistics.median(found):.2f} |")


if __name__ == "__main__":
    main()
