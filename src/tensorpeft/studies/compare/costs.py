"""What an entry's training step costs, beside the reference's in the same rounds."""

import copy
import dataclasses
import json
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from tensorpeft.reports.files import to_json, write_json
from tensorpeft.reports.versions import find_versions
from tensorpeft.studies.catalogue import REFERENCE
from tensorpeft.studies.compare.entries import Comparison, Entry, entry_folder
from tensorpeft.studies.compare.results import EntryCosts
from tensorpeft.studies.measure import median_step_times, peak_memory
from tensorpeft.training.activations import checkpoint_activations
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.head import is_head
from tensorpeft.training.models import load_tokenizer
from tensorpeft.training.recipe import Recipe
from tensorpeft.training.splits import Splits, shortest
from tensorpeft.training.trainers import make_trainer

# Of so many first batches, the one of the middle length is stepped on.
_NUM_BATCHES = 9
_NUM_ROWS = 4096  # they are prepared in seconds; some may be left out as too long
# What of a recipe, and of its data, no step depends on.
_NOT_OF_STEPS, _TESTS = ("description", "evaluate", "seeds", "output"), ("test", "test_rows")


class TrainedStep:
    """Forward, backward and update of an entry on one batch of its own trainer, gradients freed at the end.

    Args:
        entry: what is trained, at the rate in the middle of its grid.
        splits: its rows.
        folder: of its cells, which have its base in 4 bits, if it has one; written there where they have not.
    """

    def __init__(self, entry: Entry, splits: Splits, folder: Path) -> None:
        rate = entry.rates[len(entry.rates) // 2]
        trainer = {**entry.recipe.trainer, "learning_rate": rate}
        self._folder = tempfile.TemporaryDirectory()
        arguments = make_arguments(trainer, splits.task, Path(self._folder.name), 0, entry.recipe.rewards)
        recipe = dataclasses.replace(entry.recipe, trainer=trainer, output=str(folder))
        tokenizer = load_tokenizer(recipe, splits.task)
        self.trainer: Trainer = make_trainer(recipe, _few(splits, arguments), tokenizer, arguments)
        checkpoint_activations(self.trainer)
        self.model: Any = self.trainer.model
        self.optimizer = self.trainer.create_optimizer()
        self.batch = _typical_batch(self.trainer)

    def __call__(self) -> None:
        """One step."""
        # Not training_step, which only a running Trainer can take.
        self.model.train()
        trainer: Any = self.trainer
        for number in range(trainer.args.gradient_accumulation_steps):
            if hasattr(trainer, "_step"):  # TRL's GRPO: by it the answers to one batch, drawn once, are dealt out
                trainer._step = number
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(self.model, trainer._prepare_inputs(copy.copy(self.batch)))
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> tuple[int, int]:
        """Trained parameters: the new head apart, and of the head."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters() if p.requires_grad}
        head = sum(size for name, size in sizes.items() if is_head(name, self.model))
        return sum(sizes.values()) - head, head


class CostMeter:
    """Measures entries one after the other, each in turns with the reference: two models in memory at a time.

    What was measured is kept beside an entry's cells. It holds for as long as the reference, the machine and the
    libraries are the same, so that all seconds of a table are those of one measurement of the reference.

    Args:
        comparison: its reference is the entry `REFERENCE`; where there is none, no ratio is given.
        splits: the rows.
        rounds: of steps; 0: only parameters are counted.
    """

    def __init__(self, comparison: Comparison, splits: Splits, rounds: int) -> None:
        self._step_of_reference: TrainedStep | None = None
        self._reference = next((entry for entry in comparison.entries if entry.key == REFERENCE), None)
        self._splits = splits
        self._output = comparison.output
        self._rounds = rounds

    def costs(self, entry: Entry) -> EntryCosts:
        """The costs of an entry, which are measured where its folder has none that hold here."""
        path, holds_for = self._folder(entry) / "costs.json", json.loads(to_json(self._conditions(entry)))
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["of"] == holds_for:
                return EntryCosts(**found["costs"])
        costs = self._measure(entry)
        write_json(path, {"of": holds_for, "costs": dataclasses.asdict(costs)})
        return costs

    def _conditions(self, entry: Entry) -> dict[str, Any]:
        """What the costs of an entry depend on."""
        conditions = {"rounds": self._rounds, "recipe": _costing(entry.recipe)}
        if self._rounds == 0:
            return conditions
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {
            **conditions,
            "reference": None if self._reference is None else _costing(self._reference.recipe),
            "machine": [platform.node(), device],
            "versions": find_versions(),
        }

    def _measure(self, entry: Entry) -> EntryCosts:
        if self._rounds == 0:
            return EntryCosts(*self._step(entry).parameters())
        reference = self._reference
        if reference is None or entry.key == reference.key:
            step = self._step(entry)
            ratio, seconds = float(reference is not None), self._median_seconds({"": step})[""]
        else:
            # In the reference's own seconds: the machine may have been in another mood when this one was measured.
            reference_seconds = self.costs(reference).step_seconds
            step = self._step(entry)
            medians = self._median_seconds({"": self._step(reference), "entry": step})
            ratio = medians["entry"] / medians[""]
            seconds = ratio * reference_seconds
        return EntryCosts(*step.parameters(), seconds, ratio, peak_memory(step, step.trainer.args.device))

    def _step(self, entry: Entry) -> TrainedStep:
        """An entry's step; the reference's is kept."""
        if self._reference is None or entry.key != self._reference.key:
            return TrainedStep(entry, self._splits, self._folder(entry))
        if self._step_of_reference is None:
            self._step_of_reference = TrainedStep(entry, self._splits, self._folder(entry))
        return self._step_of_reference

    def _folder(self, entry: Entry) -> Path:
        return entry_folder(self._output, entry)

    def _median_seconds(self, steps: dict[str, TrainedStep]) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in median_step_times(steps, self._rounds).items()}


def _costing(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe a step depends on: neither its rate, which may be chosen anew, nor what comes after training."""
    found = dataclasses.asdict(recipe)
    for part, names in ((found, _NOT_OF_STEPS), (found["data"], _TESTS), (found["trainer"], ("learning_rate",))):
        for name in names:
            part.pop(name, None)
    return found


def _few(splits: Splits, arguments: Any) -> Splits:
    """Enough rows for the first batches, which are as random as all, and one that is not too long if any is not."""
    batch = getattr(arguments, "generation_batch_size", arguments.train_batch_size)
    # Packed, a batch takes any number of rows.
    is_packed = getattr(arguments, "packing", False)
    num = len(splits.train) if is_packed else max(_NUM_ROWS, 2 * _NUM_BATCHES * batch)
    train = [*splits.train[:num], *shortest(splits.train[num:], 1)]
    return dataclasses.replace(splits, train=train, validation=shortest(splits.validation))


def _typical_batch(trainer: Trainer) -> Any:
    """Of the first batches, one of the middle length."""
    batches = sorted(islice(trainer.get_train_dataloader(), _NUM_BATCHES), key=_size)
    return batches[len(batches) // 2]


def _size(batch: Any) -> int:
    if not isinstance(batch, Mapping):  # rows that are still to be answered: what a step costs is seen then
        return 0
    return max((value.numel() for value in batch.values() if hasattr(value, "numel")), default=0)


def saved_bytes(folders: Sequence[Path]) -> int:
    """The safetensors in the first of these folders that there is."""
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return 0 if folder is None else sum(path.stat().st_size for path in folder.glob("*.safetensors"))
