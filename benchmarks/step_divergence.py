"""How far does a step of training move the predictions, and the weights, at a rate that suits the method?

    python benchmarks/step_divergence.py studies/steps_gsm8k

Every entry of a comparison is trained for the recipe's steps at each of its rates. Of its last ten steps a line has the
medians of: KL(before ‖ after) of the predictions that the step's own batch is learned from, in nats, as
`tensorpeft.BoundedSteps` measures it; and what the step adds to a weight over the weight, in the Frobenius and in the
spectral norm, the mean over some adapted weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer

from tensorpeft import BoundedSteps
from tensorpeft.loading.quiet import quiet
from tensorpeft.reports.tables import Table
from tensorpeft.reports.terminal import print_table
from tensorpeft.studies.compare.entries import Entry, load_entries
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.models import load_tokenizer
from tensorpeft.training.splits import load_splits
from tensorpeft.training.start import start_from_gradients
from tensorpeft.training.trainers import make_trainer

_LAST, _WEIGHTS = 10, 10


class Watch(BoundedSteps):
    """Bounds nothing, and writes down what every step does."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(max_kl=float("inf"), first_steps=2**31)
        self.layers, self.found = layers, list[tuple[float, float, float]]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As it is told, after keeping what the adapter adds."""
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.deltas = self._deltas()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write down what the step changed."""
        super().on_optimizer_step(args, state, control, **kwargs)
        rate = float(max(self._rates))
        steps = [after - before for before, after in zip(self.deltas, self._deltas(), strict=True)]
        weights = [layer.base_layer.weight.detach().float() for layer in self.layers]
        of_norm = [mean(_ratios(steps, weights, order)) for order in ("fro", 2)]
        self.found.append((self.curvatures[-1] * rate**2 if rate else 0.0, of_norm[0], of_norm[1]))

    @torch.no_grad()
    def _deltas(self) -> list[Tensor]:
        return [layer.get_delta_weight("default").float() for layer in self.layers]


def _ratios(steps: Sequence[Tensor], weights: Sequence[Tensor], order: Any) -> list[float]:
    norm = torch.linalg.matrix_norm
    return [(norm(step, order) / norm(weight, order)).item() for step, weight in zip(steps, weights, strict=True)]


def make_run(entry: Entry, rate: float, seed: int, folder: str) -> Trainer:
    """The trainer of an entry of a comparison that says, saves and evaluates nothing by itself."""
    recipe = entry.recipe
    splits = load_splits(recipe)
    section = {**recipe.trainer, "learning_rate": rate, "save_strategy": "no", "eval_strategy": "no"}
    arguments = make_arguments(section, splits.task, folder, seed)  # pyright: ignore[reportArgumentType]
    trainer = make_trainer(recipe, splits, load_tokenizer(recipe, splits.task), arguments)
    if recipe.data.start_rows is not None:
        start_from_gradients(trainer, recipe.data.start_rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


@quiet()
def watch(entry: Entry, rate: float, seed: int) -> tuple[float, ...]:
    """The medians of the last steps of a run."""
    with TemporaryDirectory() as folder:
        trainer = make_run(entry, rate, seed, folder)
        model: Any = trainer.model
        layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
        watcher = Watch(layers[:: max(1, len(layers) // _WEIGHTS)])
        trainer.add_callback(watcher)
        trainer.train()
    return tuple(median(column) for column in zip(*watcher.found[-_LAST:], strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", metavar="RECIPE", help="of a comparison")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", metavar="A,B")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    comparison = load_entries(arguments.recipe, methods=arguments.methods, overrides=arguments.overrides)
    runs = [(entry, rate) for entry in comparison.entries for rate in entry.rates]
    rows = []
    for entry, rate in tqdm(runs):
        divergence, frobenius, spectral = watch(entry, rate, arguments.seed)
        row = (entry.label, f"{rate:.0e}", f"{divergence:.4f}", f"{frobenius:.1e}", f"{spectral:.1e}")
        rows.append(row)
    headers = ("method", "rate", "KL (nats)", "Frobenius", "spectral")
    print_table(Console(), Table(f"Medians of a step's changes, {arguments.recipe}", headers, rows))


if __name__ == "__main__":
    main()
