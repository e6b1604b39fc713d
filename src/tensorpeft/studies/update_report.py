"""``tensorpeft inspect update``: a recipe's gradients and full update, measured and written as tables and JSON."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from torch import Tensor, nn
from transformers import Trainer, set_seed

from tensorpeft import DotaConfig
from tensorpeft.networks.sketch import Noise, Sketch
from tensorpeft.plugin.base_weight import as_matrix, weight_of
from tensorpeft.plugin.gradients import gathering
from tensorpeft.quantization.model import plan_layers
from tensorpeft.reports.files import write_json, write_lines
from tensorpeft.reports.folders import sole_writer
from tensorpeft.reports.tables import Table, markdown_tables, model_title
from tensorpeft.reports.terminal import counting, print_table, say
from tensorpeft.studies.catalogue import methods_by_key, most_like
from tensorpeft.studies.inspected_model import kind_of
from tensorpeft.studies.update import Reach, Seen, Sizes, reaches
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.models import load_tokenizer
from tensorpeft.training.recipe import Recipe, without_adapter
from tensorpeft.training.splits import load_splits
from tensorpeft.training.start import loss_on, row_batches
from tensorpeft.training.trainers import make_trainer


def inspect_update(
    recipe: Recipe,  # with an adapter, whose targets are looked at
    rows: int,  # of each of the two gradients
    steps: int,  # of full fine-tuning; 0: none
    num_layers: int,  # weights of one kind that are looked at, evenly over the model
    sizes: Sizes,
    output: Path,  # folder, made where it does not exist
) -> dict[str, list[Reach]]:
    """The reaches by kind of weight, after printing them and writing update.md and update.json.

    The steps of full fine-tuning are the recipe's own but for their number and their rate, which is the catalogue's
    multiple for full fine-tuning.

    Raises:
        BlockingIOError: another inspection writes to the output folder.
        ValueError: the recipe has no adapter, too few rows, or what training refuses.
    """
    with sole_writer(output):
        return _inspect(recipe, rows, steps, num_layers, sizes, output)


def _inspect(
    recipe: Recipe, rows: int, steps: int, num_layers: int, sizes: Sizes, output: Path
) -> dict[str, list[Reach]]:
    if recipe.adapter is None:
        raise ValueError("adapter: null: expected an adapter, whose target_modules are looked at.")
    console, seed, full = Console(), recipe.seeds[0], _as_full(recipe, steps)
    task = find_task(full.task)
    set_seed(seed)
    arguments = make_arguments(full.trainer, task, output, seed)
    trainer = make_trainer(full, load_splits(full), load_tokenizer(full, task), arguments)
    targets = {key: recipe.adapter[key] for key in ("target_modules", "exclude_modules") if key in recipe.adapter}
    layers = _choose_layers(cast(Any, trainer.model), DotaConfig(**targets), num_layers)
    seen = _look(trainer, layers, rows, steps, max(sizes.frames, sizes.shared_frames), console)
    found = {kind: reaches([each for each in seen.values() if each.kind == kind], sizes) for kind in _kinds(seen)}
    tables = [
        _table(f"{model_title(full.model)}, {full.task}: {kind}, {_kinds(seen)[kind]} weights", reached)
        for kind, reached in found.items()
    ]
    settings = {"rows": rows, "steps": steps, "rate": arguments.learning_rate, "seed": seed, "layers": list(layers)}
    kinds = {kind: [dataclasses.asdict(reach) for reach in reached] for kind, reached in found.items()}
    write_json(output / "update.json", {"model": full.model, "task": full.task, **settings, "kinds": kinds})
    write_lines(output / "update.md", [markdown_tables(tables)])
    for table in tables:
        print_table(console, table)
    say(console, f"Tables and raw results: {output}")
    return found


def _as_full(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with all weights trained, at the rate that the catalogue has for that, and nothing saved."""
    named = recipe.trainer.get("learning_rate")
    if not isinstance(named, int | float) or isinstance(named, bool) or not named > 0:
        raise ValueError(
            f"trainer.learning_rate={named!r}: expected a number above 0, which the rate of all weights follows from."
        )
    rate = named * methods_by_key()["full"].rate / most_like(recipe.adapter).rate
    on_top = {"learning_rate": rate, "max_steps": max(steps, 1), "eval_strategy": "no", "save_strategy": "no"}
    given = {key: value for key, value in recipe.trainer.items() if not key.startswith(("eval_", "save_", "load_best"))}
    return replace(without_adapter(recipe), trainer={**given, **on_top})


def _look(
    trainer: Trainer,  # of all weights
    layers: Mapping[str, nn.Module],
    rows: int,
    steps: int,
    rank: int,  # of the sketches
    console: Console,
) -> dict[str, Seen]:
    """Both gradients of the layers' weights, one of them sketched too, and what training changes."""
    before = {name: weight_of(layer).float().clone() for name, layer in layers.items()}
    noise = Noise(int(trainer.args.seed))
    sketches = {
        name: Sketch(weight.shape[0], weight.shape[1], rank, noise, weight.device) for name, weight in before.items()
    }
    num_batches = 2 * ceil(rows / trainer.args.train_batch_size)
    first, second = row_batches(trainer, rows, int(trainer.args.seed), parts=2)
    model: Any = trainer.model
    with counting(console, "batches of the two gradients") as on_batch:
        done = count(1)
        with gathering(model, layers, sketches):
            gradient = _gradient(trainer, layers, first, lambda: on_batch(next(done), num_batches))
        with gathering(model, {}, {}):
            other = _gradient(trainer, layers, second, lambda: on_batch(next(done), num_batches))
    update: Mapping[str, Tensor | None] = dict.fromkeys(layers)
    if steps:
        say(console, f"Full fine-tuning, {steps} steps at the rate {trainer.args.learning_rate:g}.")
        trainer.train()
        update = {name: weight_of(layer).float() - before[name] for name, layer in layers.items()}
    return {
        n: Seen(_kind((n, before[n])), before[n], gradient[n], sketches[n].gradient(), other[n], update[n])
        for n in layers
    }


def _kinds(seen: Mapping[str, Seen]) -> Mapping[str, int]:
    """How many there are of each kind, in the order of the model."""
    return Counter(each.kind for each in seen.values())


def _kind(item: tuple[str, Tensor]) -> str:
    name, weight = item
    return f"{kind_of(name)}, {weight.shape[0]} x {weight.shape[1]}"


def _choose_layers(model: nn.Module, config: DotaConfig, wanted: int) -> dict[str, nn.Module]:
    """So many of every kind of target, evenly over the model."""
    shapes, _ = plan_layers(model, config)
    kinds: dict[str, list[str]] = {}
    for name in shapes:
        layer = model.get_submodule(name)
        kinds.setdefault(_kind((name, weight_of(layer))), []).append(name)
    chosen = list[str]()
    for names in kinds.values():
        number = min(wanted, len(names))
        chosen += [names[round(k * (len(names) - 1) / max(number - 1, 1))] for k in range(number)]
    return {name: model.get_submodule(name) for name in chosen}


def _gradient(
    trainer: Trainer, layers: Mapping[str, nn.Module], batches: Iterator[Any], on_batch: Callable[[], object]
) -> dict[str, Tensor]:
    """The sum over batches of whole gradients, of a few weights alone."""
    for batch in batches:
        loss_on(trainer, batch).backward()
        on_batch()
    found: dict[str, Any] = {name: layer.weight.grad for name, layer in layers.items()}
    return {name: as_matrix(layers[name], gradient).float().clone() for name, gradient in found.items()}


def _table(title: str, rows: Sequence[Reach]) -> Table:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    cells = [[row.name, f"{row.trained:,}", percent(row.other), percent(row.update)] for row in rows]
    notes = [
        "Share of the energy (%), of all these weights together: of the gradient on other rows, and of what full "
        "fine-tuning changed. Of an MPO: in the directions of small changes of its cores.",
    ]
    return Table(title, ["what moves", "trained\nper weight", "other\ngradient", "full\nupdate"], cells, notes)
