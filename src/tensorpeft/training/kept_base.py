"""A base in 4 bits, which exists nowhere else, kept for the adapters that fit no other."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tensorpeft.reports.files import make_once, to_json, write_json
from tensorpeft.training.recipe import RECIPE_FILE, Recipe

# What of a recipe tells its base; a file in the folder has it. Weights replaced under the same name are not seen.
_FIELDS = ("model", "task", "model_arguments", "quantize", "adapter")
_MADE_OF = "made_of.json"
_START_FILE = "adapter_start.safetensors"


def keep_base(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,  # None: the task is no text
    start: Mapping[str, Tensor],  # of the adapter, by its parameters' names, that the weights lack
    recipe: Recipe,
    seed: int | None,  # that the base was drawn with; None: it is the same for all seeds
) -> None:
    """Save a base in the recipe's output folder, as ``base`` or ``base-SEED``, and let adapters name it.

    One that is there is kept if it was made of the same; cells of one entry of `compare` share it. Another one, such
    as a try that ended before it was a run leaves behind, is replaced, unless a run names it.

    Raises:
        ValueError: a run names a base there that was made of something else, or the folder is none of ours.
    """
    folder, made_of = _folder(recipe, seed), _made_of(recipe)

    def make(unfinished: Path) -> None:
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        save_file({name: tensor.contiguous() for name, tensor in start.items()}, unfinished / _START_FILE)
        write_json(unfinished / _MADE_OF, made_of)

    if PartialState().is_main_process:
        make_once(folder, make, lambda found: _is_kept(found, made_of))
    model.name_or_path = model.config._name_or_path = str(folder)


def find_kept(recipe: Recipe, seed: int | None) -> Path | None:
    """The folder of the base that `keep_base` has kept for the same; None: there is none, or of an earlier version."""
    folder = _folder(recipe, seed)
    is_whole = all((folder / name).is_file() for name in (_MADE_OF, _START_FILE))
    is_it = is_whole and json.loads((folder / _MADE_OF).read_text(encoding="utf-8")) == _made_of(recipe)
    return folder if is_it else None


def read_start(folder: Path) -> dict[str, Tensor]:
    """The adapter's start that was kept beside a base."""
    return load_file(folder / _START_FILE)


def _folder(recipe: Recipe, seed: int | None) -> Path:
    return Path(recipe.output).absolute() / ("base" if seed is None else f"base-{seed}")


def _made_of(recipe: Recipe) -> dict[str, Any]:
    return json.loads(to_json({name: getattr(recipe, name) for name in _FIELDS}))


def _is_kept(folder: Path, made_of: dict[str, Any]) -> bool:
    """Whether a folder holds the base that is made of this; one that holds another may be replaced."""
    if not folder.exists():
        return False
    is_named = any(next(folder.parent.glob(f"{place}{RECIPE_FILE}"), None) for place in ("", "rate-*/"))
    file = folder / _MADE_OF
    if not file.is_file():
        if is_named:  # of an earlier version: the run that names it was checked to have this recipe
            return True
        raise ValueError(f"{folder}: it is no base that a run here has left. Remove it, or pass another output folder.")
    found = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name in made_of if found.get(name) != made_of[name]]
    if other and is_named:
        raise ValueError(
            f"{folder}: the runs here have a base with {other[0]}: {found.get(other[0])}, the recipe "
            f"{made_of[other[0]]}. Pass another output folder."
        )
    return not other
