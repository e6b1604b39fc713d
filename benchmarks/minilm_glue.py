"""MiniLM-L6 on CoLA, RTE and 10,000 rows of SST-2: full fine-tuning, LoRA, DoTA and LoRTA, three seeds each.

Runs the recipe small/minilm_glue for every task and method, and prints a Markdown table. Finished runs are kept in
the output folder and not run again; with --print-only nothing is run. Two hours of one CPU thread.

The learning rates are those that a search over a grid chose on CoLA's validation loss, for all three tasks; the head's
is 1e-3 with every method.
"""

import argparse
import statistics
from pathlib import Path

from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.results import SeedResult, read_result
from tensorpeft.training.run import run_training

RECIPE = "small/minilm_glue"
TASKS = {"cola": "Matthews", "rte": "accuracy", "sst2": "accuracy"}
METHODS = {
    "full fine-tuning": ["adapter=null", "trainer.learning_rate=3e-5"],
    "LoRA r=8": [
        "adapter.method=lora",
        "adapter.r=8",
        "adapter.lora_alpha=16",
        "adapter.target_modules=${values.all}",
        "trainer.learning_rate=9e-4",
    ],
    "DoTA r=16": ["trainer.learning_rate=3e-4"],
    "LoRTA r=16": [
        "adapter.method=lorta",
        "adapter.r=16",
        "adapter.target_modules=${values.attention}",
        "trainer.learning_rate=9e-3",
    ],
}


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/small/minilm_glue"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe; with another --output")
    parser.add_argument("--print-only", action="store_true", help="print what is finished, run nothing")
    arguments = parser.parse_args()
    results = {}
    for task in arguments.tasks:
        for name, overrides in METHODS.items():
            folder = arguments.output / task / name.replace(" ", "-")
            if not arguments.print_only:
                every = [f"task={task}", f"output={folder}", *overrides, *arguments.overrides]
                run_training(load_recipe(RECIPE, every), resume=True)
            results[task, name] = [read_result(path) for path in sorted(folder.glob("seed-*/results.json"))]
    print_table(results, arguments.tasks)


def print_table(results: dict[tuple[str, str], list[SeedResult]], tasks: list[str]) -> None:
    """Per method: the parameters it trains, and of each task the test score × 100 and the validation loss."""
    headers = ["method", "trained"]
    for task in tasks:
        headers += [f"{task}: {TASKS[task]} × 100", f"{task}: valid. loss"]
    print("| " + " | ".join(headers) + " |\n|" + " --- |" * len(headers))
    for name in METHODS:
        runs = [results[task, name] for task in tasks]
        trained = next((f"{found[0].trained_parameters:,}" for found in runs if found), "")
        cells = [name, trained]
        for task, found in zip(tasks, runs, strict=True):
            cells.append(spread([100 * result.tests[task][TASKS[task]] for result in found], 1))
            cells.append(spread([result.validation["loss"] for result in found], 3))
        print("| " + " | ".join(cells) + " |")


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds, and how many there are where it is not three."""
    if not values:
        return "not run"
    text = f"{statistics.fmean(values):.{digits}f}"
    text += f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return text if len(values) == 3 else f"{text} ({len(values)} seeds)"


if __name__ == "__main__":
    main()
