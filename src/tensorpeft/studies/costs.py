"""What a method costs on the demo's model: parameters, bytes on disk, memory and time of a training step."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from tensorpeft.studies.demo_methods import Method
from tensorpeft.studies.finetune import Recipe, Row, TrainingStep, build_model, collate
from tensorpeft.studies.measure import median_step_times, peak_memory


@dataclass(frozen=True)
class Costs:
    """The costs of one method.

    Args:
        head_parameters: trained parameters of the classification head, the same for all methods.
        other_parameters: all other trained parameters: the adapter's, or the model's own.
        checkpoint_bytes: size of the safetensors files that ``save_pretrained`` writes.
        peak_bytes: largest memory of a training step above weights and optimiser state.
        step_seconds: times of single training steps, methods in turn.
    """

    head_parameters: int
    other_parameters: int
    checkpoint_bytes: int
    peak_bytes: int
    step_seconds: tuple[float, ...]


def measure_costs(
    methods: Sequence[Method],
    num_labels: int,
    rows: Sequence[Row],  # one batch; every method steps on it
    recipe: Recipe,
    rounds: int,
) -> list[Costs]:
    """The costs of each method, on one batch, with all the models alive at the same time."""
    batch = collate(rows, recipe.device)
    models = {method.key: build_model(method, num_labels, seed=0).to(recipe.device) for method in methods}
    steps = {
        method.key: partial(
            TrainingStep(models[method.key], method.rates[0], make_optimizer=method.make_optimizer), batch
        )
        for method in methods
    }
    seconds = median_step_times(steps, rounds)
    return [_costs(models[key], peak_memory(steps[key], recipe.device), seconds[key]) for key in models]


def _costs(model: nn.Module, peak_bytes: int, seconds: list[float]) -> Costs:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = sum(size for name, size in sizes.items() if "classifier" in name)
    return Costs(
        head_parameters=head,
        other_parameters=sum(sizes.values()) - head,
        checkpoint_bytes=_checkpoint_bytes(model),
        peak_bytes=peak_bytes,
        step_seconds=tuple(seconds),
    )


def _checkpoint_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
