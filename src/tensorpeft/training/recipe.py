"""A recipe: one YAML file that says what is fine-tuned, with which adapter, on which data, with which arguments."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# Keys of a file that are no part of the finished recipe.
_INHERITS, _SMOKE, _VALUES = "inherits", "smoke", "values"


@dataclass(frozen=True)
class DataRecipe:
    """Where the rows come from. A source is a file or folder, ``{hub: NAME, ...}``, or a list of sources.

    Args:
        train: source of the training rows.
        validation: a source, or how many rows are drawn from the training rows instead.
        test: a source, or sources by name of the task they belong to; None: nothing is tested.
        train_rows: train on so many rows, drawn by ``seed``; None: on all that validation leaves.
        validation_rows: of the source of validation, at most, the first ones; None: all.
        test_rows: of every test source, at most, the first ones; None: all.
        seed: of the drawing; the same for all ``seeds`` of a recipe.
        max_length: tokens of a row to classify; longer ones are cut. Language models: trainer.max_length.
        loss_on: "text" (prompt and response, as LLM-Adapters does) or "response"; for questions.
    """

    train: Any
    validation: Any
    test: Any = None
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    seed: int = 0
    max_length: int | None = None
    loss_on: str = "response"

    def __post_init__(self) -> None:
        if self.loss_on not in ("text", "response"):
            raise ValueError(f"data.loss_on={self.loss_on!r}: expected text or response.")
        for name in ("train_rows", "validation_rows", "test_rows", "max_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"data.{name}={value!r}: expected a whole number, at least 1, or null.")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run.

    Args:
        model: Hub name or folder.
        task: name of a task (``tensorpeft.tasks.registry``).
        data: where the rows come from.
        adapter: ``method`` and the fields of its configuration, of ours or of PEFT's; None: all weights are trained.
        description: what it is, and where the figures come from.
        model_arguments: of transformers' ``from_pretrained``.
        quantize: arguments of `tensorpeft.quantization.quantize_residual`, which is done first; with ``residual:
            false`` all weights become plain NF4, QLoRA's base. None: nothing is quantised.
        trainer: arguments of `transformers.TrainingArguments`, `trl.SFTConfig` or `trl.DPOConfig`, as the task wants.
        head_learning_rate: of a head that starts from noise; None: the rate of the rest.
        evaluate: arguments of the evaluation on the test rows.
        seeds: a run for each: the head's and the adapter's start, the order of the rows, dropout.
        output: folder of checkpoints and report.
    """

    model: str
    task: str
    data: DataRecipe
    adapter: Mapping[str, Any] | None = None
    description: str = ""
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    quantize: Mapping[str, Any] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    head_learning_rate: float | None = None
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    output: str = "runs/train"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(isinstance(s, int) for s in self.seeds):
            raise ValueError(
                f"seeds={list(self.seeds)}: expected a list of different whole numbers, such as [0, 1, 2]."
            )
        if self.adapter is not None and "method" not in self.adapter:
            raise ValueError(
                f"adapter={dict(self.adapter)}: expected a field method, such as dota or lora. To train all weights, "
                "write adapter: null."
            )

    def to_yaml(self) -> str:
        """The recipe as YAML; `load_recipe` reads it back."""
        return OmegaConf.to_yaml(OmegaConf.create(_plain(self)))


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),  # each KEY=VALUE, such as "trainer.learning_rate=1e-3"
    smoke: bool = False,  # with the file's ``smoke`` section on top
) -> Recipe:
    """The recipe of a YAML file.

    ``inherits: OTHER.yaml`` puts a file under it; ``smoke`` is put on top where it is asked for; ``values`` are free,
    for others to refer to. ``${values.name}``, ``${oc.env:NAME,default}`` and ``${package:NAME}`` (the folder of an
    installed package) are filled in. A mapping is merged field by field, but a source of data or an adapter of another
    method replaces the one below.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no recipe; names the key and what is known.
    """
    OmegaConf.register_resolver("package", _package_folder, replace=True)
    try:
        tree = _read(Path(path))
        if smoke:
            if _SMOKE not in tree:
                raise ValueError(f"{path}: it has no section smoke. Run it without --smoke, or write one.")
            tree = _put_on(tree, tree[_SMOKE])
        tree.pop(_SMOKE, None)
        tree = _put_on(tree, OmegaConf.from_dotlist(list(overrides)), whole_sources=False)
        plain: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error}") from None
    plain.pop(_VALUES, None)
    return _as_recipe(plain, str(path))


def check_keys(
    found: Collection[str],
    known: Collection[str],
    what: str,  # such as "trainer"
) -> None:
    """Refuse keys that are unknown, naming the nearest known one.

    Raises:
        ValueError: a key is unknown.
    """
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(sorted(known))}."
            raise ValueError(f"{what}: unknown key {key!r}. {hint}")


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}. Pass the path of a YAML file, such as those in recipes/.")
    try:
        tree = OmegaConf.load(path)
    except YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path}: expected a mapping with model, task and data.")
    parent = tree.pop(_INHERITS, None)
    return tree if parent is None else _put_on(_read(path.parent / parent), tree)


def _put_on(below: DictConfig, above: Any, whole_sources: bool = True) -> DictConfig:
    """``above`` merged onto ``below``."""
    below, above = below.copy(), above.copy()
    if whole_sources:
        for key in above.get("data") or ():
            if below.get("data") is not None:
                below.data.pop(key, None)
    if "adapter" in above and _method(above, _method(below)) != _method(below):
        below.pop("adapter", None)
    return OmegaConf.merge(below, above)  # pyright: ignore[reportReturnType]


def _method(tree: DictConfig, otherwise: str | None = None) -> str | None:
    """The adapter's method; ``otherwise`` where its mapping leaves it out; None where there is no adapter."""
    adapter = tree.get("adapter")
    return adapter.get("method", otherwise) if isinstance(adapter, DictConfig) else None


def _package_folder(name: str) -> str:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f'the recipe needs the package {name}, which is not installed. Run: pip install "{name}"')
    return str(Path(spec.origin).parent)


def _as_recipe(tree: dict[str, Any], place: str) -> Recipe:
    check_keys(tree, [f.name for f in fields(Recipe)], place)
    if missing := [name for name in ("model", "task", "data") if not tree.get(name)]:
        raise ValueError(f"{place}: {missing[0]} is missing. A recipe needs model, task and data.")
    for name in ("data", "model_arguments", "quantize", "trainer", "evaluate", "adapter"):
        if tree.get(name) is not None and not isinstance(tree[name], dict):
            raise ValueError(f"{place}: {name}={tree[name]!r}: expected a mapping of fields.")
    data = tree["data"]
    check_keys(data, [f.name for f in fields(DataRecipe)], f"{place}: data")
    if missing := [name for name in ("train", "validation") if not data.get(name)]:
        raise ValueError(f"{place}: data.{missing[0]} is missing: a file, a folder, {{hub: NAME}}, or a list of them.")
    seeds = tree.get("seeds", (0,))
    tree = {**tree, "data": DataRecipe(**data), "seeds": (seeds,) if isinstance(seeds, int) else tuple(seeds)}
    # Null takes back what a file below says.
    for name in ("model_arguments", "trainer", "evaluate"):
        tree[name] = {key: value for key, value in (tree.get(name) or {}).items() if value is not None}
    return Recipe(**tree)


def _plain(recipe: Recipe) -> dict[str, Any]:
    tree = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    tree["data"] = {f.name: getattr(recipe.data, f.name) for f in fields(recipe.data)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in tree.items()}
