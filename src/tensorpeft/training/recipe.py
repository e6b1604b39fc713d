"""A recipe: one YAML file that says what is fine-tuned, with which adapter, on which data, with which arguments."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tensorpeft.loading.packages import package_folder
from tensorpeft.recipes import find_recipe
from tensorpeft.tasks.task import loss_unit
from tensorpeft.training.fields import is_number, is_whole
from tensorpeft.training.head_recipe import HeadRecipe

RECIPE_FILE = "recipe.yaml"  # of a run, in its folder
# Keys of a file that are no part of the finished recipe.
_INHERITS, _SMOKE, _VALUES, _COMPARE = "inherits", "smoke", "values", "compare"
SMOKE_ENDING = "-smoke"  # of the folder of a comparison that is tried
_NUM_SEEDS = 2**32  # numpy takes no others


@dataclass(frozen=True)
class DataRecipe:
    """Where the rows come from. A source is a file or folder, ``{hub: NAME, ...}``, or a list of sources.

    Args:
        train: source of the training rows.
        validation: a source, or how many rows are drawn from the training rows instead.
        test: a source, or sources by name of the task they belong to; None: nothing is tested.
        train_rows: train on so many rows, drawn by ``seed``; None: on all that validation leaves.
        validation_rows: of the source of validation, at most, the first ones; None: all. Not where rows are drawn.
        test_rows: of every test source, at most, the first ones; None: all.
        start_rows: the adapter's frames are set from the gradient of so many training rows, drawn by the run's seed
            (`tensorpeft.initialize_from_gradients`); None: they start as the method says.
        seed: of the drawing; the same for all ``seeds`` of a recipe.
        max_length: tokens of a row to classify; longer ones are cut, of the tests, too, unless ``evaluate`` says
            another. Language models: trainer.max_length.
        loss_on: "text" (prompt and response, as LLM-Adapters does) or "response"; for questions.
        chat: write questions, of the tests, too, in the model's chat template; for questions.
    """

    train: Any
    validation: Any
    test: Any = None
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    start_rows: int | None = None
    seed: int = 0
    max_length: int | None = None
    loss_on: str = "response"
    chat: bool = False

    def __post_init__(self) -> None:
        if self.loss_on not in ("text", "response"):
            raise ValueError(f"data.loss_on={self.loss_on!r}: expected text or response.")
        if not isinstance(self.chat, bool):
            raise ValueError(f"data.chat={self.chat!r}: expected true or false.")
        for name in ("train_rows", "validation_rows", "test_rows", "start_rows", "max_length"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, at_least=1):
                raise ValueError(f"data.{name}={value!r}: expected a whole number, at least 1, or null.")
        if isinstance(self.validation, int):
            if not is_whole(self.validation, at_least=1):
                raise ValueError(
                    f"data.validation={self.validation}: expected a source, or a number of rows, at least 1."
                )
            if self.validation_rows is not None:
                raise ValueError(
                    f"data.validation_rows={self.validation_rows}: data.validation={self.validation} says how many "
                    "rows are drawn already. Write data.validation_rows: null, or a source as data.validation."
                )
        if not is_whole(self.seed):
            raise ValueError(f"data.seed={self.seed!r}: expected a whole number, at least 0.")


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
        quantize: arguments of `tensorpeft.quantization.quantize_residual`, which is done first: of DoTA's residual, or
            of that of a LoRA with init_lora_weights: pissa. With ``residual: false`` all weights become plain NF4,
            QLoRA's base. None: nothing is quantised.
        trainer: arguments of `transformers.TrainingArguments`, `trl.SFTConfig`, `trl.DPOConfig` or `trl.GRPOConfig`, as
            the task and ``rewards`` want.
        rewards: weight by name (`tensorpeft.training.rewards`): the model answers the questions itself, and is trained
            by reinforcement, TRL's GRPO. None: it is shown the right responses.
        max_step_kl: what a typical step may change the predictions by, in nats (`tensorpeft.BoundedSteps`), such as
            0.01: a learning rate that is too high is then scaled down; None: steps are as long as the optimiser says.
        head_learning_rate: of a head that starts from noise; None: the rate of the rest.
        head: what is trained of that head; None: all of it.
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
    rewards: Mapping[str, float] | None = None
    max_step_kl: float | None = None
    head_learning_rate: float | None = None
    head: HeadRecipe | None = None
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    output: str = "runs/train"

    def __post_init__(self) -> None:
        for name in ("model", "task", "output", "description"):
            value = getattr(self, name)
            if not isinstance(value, str) or not (value.strip() or name == "description"):
                raise ValueError(f"{name}={value!r}: expected a text.")
        wrong = not self.seeds or not all(is_whole(seed) and seed < _NUM_SEEDS for seed in self.seeds)
        if wrong or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds={list(self.seeds)}: expected a list of different whole numbers, such as [0, 1, 2]."
            )
        if self.rewards is not None and not (self.rewards and all(map(is_number, self.rewards.values()))):
            raise ValueError(
                f"rewards={dict(self.rewards)}: expected a number by name, such as {{answer: 1, format: 0.5}}."
            )
        rate, bound = self.head_learning_rate, self.max_step_kl
        if rate is not None and not is_number(rate, above=0):
            raise ValueError(f"head_learning_rate={rate!r}: expected a number above 0, such as 1e-3, or null.")
        if bound is not None and not is_number(bound, above=0):
            raise ValueError(f"max_step_kl={bound!r}: expected nats above 0, such as 0.01, or null.")
        if self.adapter is not None and "method" not in self.adapter:
            raise ValueError(
                f"adapter={dict(self.adapter)}: expected a field method, such as dota or lora. To train all weights, "
                "write adapter: null."
            )

    @property
    def loss_unit(self) -> str:
        """What its validation loss is, or is in."""
        from tensorpeft.tasks.registry import find_task  # here, because it imports every task

        return loss_unit(find_task(self.task)) if self.rewards is None else "minus the reward"

    def to_yaml(self) -> str:
        """The recipe as YAML; `load_recipe` reads it back."""
        return OmegaConf.to_yaml(OmegaConf.create(_as_yaml(asdict(self))))


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),  # each KEY=VALUE, such as "trainer.learning_rate=1e-3"
    smoke: bool = False,  # with the file's ``smoke`` section on top
    on_top: Mapping[str, Any] | None = None,  # what comes last, a part of a recipe
) -> Recipe:
    """The recipe of a YAML file, which is given as `tensorpeft.recipes.find_recipe` takes it: by path, or by name.

    ``inherits: OTHER`` puts a file under it, one beside it or a packaged one; ``smoke`` is put on top where it is asked
    for; ``values`` are free, for others to refer to; ``compare`` is for `load_comparison`, and its folder gets another
    name with ``smoke``. ``${values.name}``,
    ``${oc.env:NAME,default}`` and ``${package:NAME}`` (the folder of an installed package) are filled in. A mapping is
    merged field by field, but a source of data or an adapter of another method replaces the one below. Smoke sections
    are put on in the order of their files; what one says of an adapter goes with an adapter that is replaced. Null
    takes back what is said below.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no recipe; names the key and what is known.
    """
    plain = _load_plain(path, overrides, smoke, on_top or {})
    for key in (_VALUES, _COMPARE):
        plain.pop(key, None)
    return _as_recipe(plain, str(path))


def load_comparison(path: str | Path, overrides: Sequence[str] = (), smoke: bool = False) -> dict[str, Any]:
    """The section ``compare`` of a YAML file as `load_recipe` reads it; empty where it has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no recipe, or the section is no mapping.
    """
    section = _load_plain(path, overrides, smoke, {}).get(_COMPARE) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {_COMPARE}={section!r}: expected a mapping of fields.")
    return section


def _load_plain(path: str | Path, overrides: Sequence[str], smoke: bool, on_top: Mapping[str, Any]) -> dict[str, Any]:
    OmegaConf.register_resolver("package", _package_folder, replace=True)
    try:
        tree = _override(_compose(_read(find_recipe(path)), smoke, str(path)), overrides)
        tree = _put_on(tree, OmegaConf.create(_as_yaml(on_top))) if on_top else tree
        plain: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error}") from None
    return plain


def without_adapter(recipe: Recipe) -> Recipe:
    """The recipe for its model without an adapter, where nothing or everything is trained: what only stands beside an
    adapter (4-bit weights, a part of a head, a start from gradients) goes with it.
    """
    data = replace(recipe.data, start_rows=None)
    return replace(recipe, adapter=None, quantize=None, head=None, data=data)


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


def _read(
    path: Path,
    heirs: tuple[Path, ...] = (),  # files that inherit this one
) -> list[DictConfig]:
    """The trees of a file and of those that it inherits, the lowest first."""
    if path.resolve() in heirs:
        raise ValueError(f"{path}: it inherits itself. Remove inherits from it or from {heirs[-1]}.")
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path}: expected a mapping with model, task and data.")
    parent = tree.pop(_INHERITS, None)
    if parent is None:
        return [tree]
    if not isinstance(parent, str):
        raise ValueError(f"{path}: inherits={parent!r}: expected the path of one file.")
    try:
        below = find_recipe(parent, beside=path.parent)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: inherits: {error}") from None
    return [*_read(below, (*heirs, path.resolve())), tree]


def _compose(layers: Sequence[DictConfig], smoke: bool, place: str) -> DictConfig:
    """The layers put on each other, and their smoke sections on top where ``smoke`` is True."""
    tree = OmegaConf.create()
    sections: list[tuple[Any, DictConfig]] = []  # each with the tree that it was written for
    for layer in layers:
        has_section, section = _SMOKE in layer, layer.pop(_SMOKE, None)
        tree = _put_on(tree, layer)
        if has_section:
            sections = [] if section is None else [*sections, (section, tree)]
    if smoke and not sections:
        raise ValueError(f"{place}: it has no section smoke. Run it without --smoke, or write one.")
    whole = tree
    output = _raw(tree, _COMPARE).get("output")
    if smoke and isinstance(output, str):  # a folder of its own, unless a section says which: the real one is taken
        tree = _put_on(tree, OmegaConf.create({_COMPARE: {"output": f"{output}{SMOKE_ENDING}"}}))
    for section, written_for in sections if smoke else ():
        if not isinstance(section, DictConfig):
            raise ValueError(f"{place}: smoke={section!r}: expected a mapping such as the recipe's own.")
        adapter = _raw(section, "adapter")
        if adapter and "method" not in adapter and _method(written_for) != _method(whole):
            section.pop("adapter")
        tree = _put_on(tree, section)
    return tree


def _override(tree: DictConfig, overrides: Sequence[str]) -> DictConfig:
    above, keys = OmegaConf.create(), []
    for override in overrides:
        if not re.match(r"[^=\[\]]+=", override):
            raise ValueError(
                f"{override!r}: expected KEY=VALUE, such as trainer.learning_rate=1e-3; a list is given whole, such as "
                "seeds=[0,1]."
            )
        try:
            above.merge_with_dotlist([override])
        except YAMLError as error:
            raise ValueError(f"{override!r}: the value is not YAML: {error}") from None
        keys.append(override.partition("=")[0])
    # data.train={hub: NAME} is a source, data.train.split=test a field of the one that is there.
    return _put_on(tree, above, None if "data" in keys else keys)


def _put_on(
    below: DictConfig,
    above: DictConfig,
    replaced: Iterable[str] | None = None,  # keys within data that are not merged; None: all sources
) -> DictConfig:
    """``above`` merged onto ``below``."""
    below = below.copy()
    if replaced is None:
        replaced = [f"data.{key}" for key in _raw(above, "data")]
    for folder, _, name in (key.rpartition(".") for key in replaced if key.startswith("data.")):
        node = OmegaConf.select(below, folder)
        if isinstance(node, DictConfig):
            node.pop(name, None)
    merged = _merge(below, above)
    if "adapter" in above and _method(merged) != _method(below):
        below.pop("adapter", None)
        merged = _merge(below, above)
    return merged


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    try:
        return OmegaConf.merge(below, above)  # pyright: ignore[reportReturnType]
    except TypeError:
        raise ValueError(
            f"{OmegaConf.to_container(above)}: it has a list where the recipe has a mapping, or the reverse."
        ) from None


def _raw(tree: DictConfig, key: str) -> dict[Any, Any]:
    """A mapping of the tree, references as they stand, which others than the whole tree may not resolve."""
    plain: Any = OmegaConf.to_container(tree)
    return plain[key] if isinstance(plain.get(key), dict) else {}


def _method(tree: DictConfig) -> str | None:
    """The adapter's method; None where there is no adapter, or it does not say."""
    adapter = tree.get("adapter")
    return adapter.get("method") if isinstance(adapter, DictConfig) else None


def _package_folder(name: str) -> str:
    return str(package_folder(name, "the recipe"))


def _as_recipe(tree: dict[str, Any], place: str) -> Recipe:
    check_keys(tree, [f.name for f in fields(Recipe)], place)
    for name in ("data", "model_arguments", "quantize", "trainer", "evaluate", "adapter", "head", "rewards"):
        if tree.get(name) is not None and not isinstance(tree[name], dict):
            raise ValueError(f"{place}: {name}={tree[name]!r}: expected a mapping of fields.")
    # Null takes back what a file below says. Not in adapter and trainer: some of their fields mean something by None.
    tree = _without_nulls(tree)
    for name in ("data", "model_arguments", "quantize", "evaluate", "head", "rewards"):
        if name in tree:
            tree[name] = _without_nulls(tree[name])
    if missing := [name for name in ("model", "task", "data") if not tree.get(name)]:
        raise ValueError(f"{place}: {missing[0]} is missing. A recipe needs model, task and data.")
    data, seeds = tree["data"], tree.get("seeds", [0])
    check_keys(data, [f.name for f in fields(DataRecipe)], f"{place}: data")
    if missing := [name for name in ("train", "validation") if data.get(name) in (None, "", [], {})]:
        raise ValueError(f"{place}: data.{missing[0]} is missing: a file, a folder, {{hub: NAME}}, or a list of them.")
    head = tree.get("head")
    if head is not None:
        check_keys(head, [f.name for f in fields(HeadRecipe)], f"{place}: head")
        head.setdefault("target_modules", None)
    try:
        return Recipe(
            **{
                **tree,
                "data": DataRecipe(**data),
                "head": None if head is None else HeadRecipe(**head),
                "seeds": tuple(seeds) if isinstance(seeds, list) else (seeds,),
            }
        )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _without_nulls(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if value is not None}


def _as_yaml(value: Any) -> Any:
    """A value of a recipe as YAML has it: what only looks like a reference is escaped."""
    if isinstance(value, Mapping):
        return {key: _as_yaml(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_yaml(part) for part in value]
    if isinstance(value, str | Path):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
    return value
