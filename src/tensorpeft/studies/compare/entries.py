"""What is compared: entries that are each the recipe with something put on top, and a grid of learning rates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorpeft.studies.budget import parse_count
from tensorpeft.studies.rates import rate_grid
from tensorpeft.training.recipe import Recipe, check_keys, load_comparison, load_recipe

REFERENCE = "lora"
DEFAULT = ("full", REFERENCE, "dota", "dota-random", "lorta", "lotr")
# What of the recipe's adapter every other method is given too: which weights are adapted.
_SHARED_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_SECTION = ("seeds", "methods", "rate_scale", "budget", "target_loss", "widenings", "output")
_ON_TOP = ("trainer", "quantize", "model_arguments", "head_learning_rate")
_ENTRY = ("label", "note", "rates", "knob", "adapter", *_ON_TOP)


@dataclass(frozen=True)
class BuiltIn:
    """A method as it is compared where a recipe says no more of it than its name.

    Args:
        label: how tables call it; of an adapter with a knob, the knob's value follows.
        adapter: method and fields of the adapter; None: all weights are trained.
        rate: the learning rate that suits it, as a multiple of the one that suits LoRA.
        knob: the field of the adapter that makes it larger, which a budget sets; None: there is none.
    """

    label: str
    adapter: Mapping[str, Any] | None
    rate: float
    knob: str | None = "r"

    @property
    def method(self) -> str | None:
        """Of its adapter."""
        return None if self.adapter is None else self.adapter["method"]


# The multiples are those that tensorpeft demo chose on MiniLM (docs/demo.md), to a factor of three.
BUILT_IN = {
    "full": BuiltIn("full fine-tuning", None, 0.03, None),
    REFERENCE: BuiltIn("LoRA", {"method": "lora", "r": 8, "lora_alpha": 16}, 1),
    "dota": BuiltIn("DoTA", {"method": "dota", "r": 16}, 1),
    "dota-random": BuiltIn("DoTA-random", {"method": "dota", "r": 16, "init_weights": "random"}, 3),
    "lorta": BuiltIn("LoRTA", {"method": "lorta", "r": 16}, 10),
    "lotr": BuiltIn("LoTR", {"method": "lotr", "r": 16}, 3),
    "fact-tt": BuiltIn("FacT-TT", {"method": "fact", "r": 16}, 3),
    "fact-tk": BuiltIn("FacT-TK", {"method": "fact", "r": 16, "core": "tk"}, 3),
    # Its trains hardly grow with r, and one that is a large prime is one mode.
    "loretta": BuiltIn("LoRETTA", {"method": "loretta", "r": 8}, 3, "tt_rank"),
    "loretta-adapter": BuiltIn("LoRETTA-adp", {"method": "lorettaadapter"}, 3, "tt_rank"),
    "flora": BuiltIn("FLoRA", {"method": "flora", "r": 8}, 1),
    "nola": BuiltIn("NOLA", {"method": "nola", "r": 8}, 10, "num_bases"),
    "quanta": BuiltIn("QuanTA", {"method": "quanta"}, 0.3, None),
    "dora": BuiltIn("DoRA", {"method": "lora", "r": 8, "lora_alpha": 16, "use_dora": True}, 1),
    "rslora": BuiltIn("rsLoRA", {"method": "lora", "r": 8, "lora_alpha": 16, "use_rslora": True}, 1),
    "pissa": BuiltIn("PiSSA", {"method": "lora", "r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}, 0.3),
    "vera": BuiltIn("VeRA", {"method": "vera", "r": 256}, 3),
    "ia3": BuiltIn("IA3", {"method": "ia3"}, 10, None),
}


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Args:
        key: how ``--methods`` calls it, and its folder.
        label: how tables and plots call it.
        recipe: what is run, but for the learning rate and the seed.
        rates: learning rates to choose from, ascending.
        note: what a reader of its row must know.
        knob: the field of its adapter that a budget sets; None: there is none.
    """

    key: str
    label: str
    recipe: Recipe
    rates: tuple[float, ...]
    note: str = ""
    knob: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All that is compared, and how.

    Args:
        recipe: the model, data, steps and evaluation that all entries have in common.
        entries: in the order of the table.
        seeds: final runs per entry; the first one also chooses the rate.
        widenings: how often an entry whose best rate is the edge of its grid tries one more rate beyond.
        target_loss: the loss for "time to a loss"; None: the lowest one that every entry reaches.
        output: folder.
        budget: trained parameters that the entries' knobs are set to come closest to; None: they stand as they are.
    """

    recipe: Recipe
    entries: tuple[Entry, ...]
    seeds: int
    widenings: int
    target_loss: float | None
    output: Path
    budget: int | None = None


def load_entries(
    path: str | Path,
    methods: str | None = None,  # such as "dota,lora"; None: the recipe's, or `DEFAULT`
    seeds: int | None = None,  # None: the recipe's, or 3
    overrides: Sequence[str] = (),  # of the recipe, as `load_recipe` takes them
    smoke: bool = False,
    output: Path | None = None,  # None: the recipe's
    budget: int | None = None,  # trained parameters of every entry; None: the recipe's, or as the entries are
    target_loss: float | None = None,  # None: the recipe's, or the lowest that all reach
) -> Comparison:
    """The comparison that a recipe and the command's options describe.

    The recipe's section ``compare`` may have ``methods`` ({key: null, or a part of a recipe with ``label``, ``rates``,
    ``note`` and ``knob``}), ``seeds``, ``rate_scale``, ``budget`` (such as 50k), ``widenings``, ``target_loss`` and
    ``output``. A key of `BUILT_IN` begins with what is there; an adapter of the recipe's own method begins with the
    recipe's; every adapter has the recipe's targets. Without ``rates``, an entry chooses among three: the recipe's
    learning rate, times what its method wants of it, and √10 below and above.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: a key or a value is unknown or wrong.
    """
    recipe = load_recipe(path, overrides, smoke)
    section = load_comparison(path, overrides, smoke)
    check_keys(section, _SECTION, f"{path}: compare")
    described = section.get("methods") or {}
    if not isinstance(described, dict):
        raise ValueError(f"{path}: compare.methods={described!r}: expected a mapping from a name to its fields.")
    keys = [key.strip() for key in methods.split(",")] if methods is not None else list(described or DEFAULT)
    check_keys(keys, {**described, **BUILT_IN}, "methods")
    if len(set(keys)) < len(keys):
        raise ValueError(f"methods={','.join(keys)}: one is there twice. Give each once.")
    rate = recipe.trainer.get("learning_rate")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or rate <= 0:
        raise ValueError(f"{path}: trainer.learning_rate={rate!r}: expected a number, for grids to begin from.")
    base_rate = rate * float(section.get("rate_scale", 1)) / _most_like(recipe.adapter).rate
    if missing := [key for key in keys if key not in BUILT_IN and described.get(key) is None]:
        raise ValueError(f"{path}: compare.methods.{missing[0]} is empty, and no method is built in by that name.")

    def read(on_top: Mapping[str, Any]) -> Recipe:
        return load_recipe(path, overrides, smoke, on_top)

    entries = tuple(_make_entry(key, described.get(key) or {}, recipe, base_rate, read) for key in keys)
    wanted = seeds if seeds is not None else section.get("seeds", 3)
    for name, value, least in (("seeds", wanted, 1), ("widenings", section.get("widenings", 2), 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}.")
    return Comparison(
        recipe=recipe,
        entries=entries,
        seeds=wanted,
        widenings=section.get("widenings", 2),
        target_loss=target_loss if target_loss is not None else section.get("target_loss"),
        budget=budget if budget is not None or "budget" not in section else parse_count(str(section["budget"])),
        output=output or Path(section.get("output") or f"runs/compare/{Path(path).stem}"),
    )


def _make_entry(
    key: str,
    described: Any,
    recipe: Recipe,
    base_rate: float,  # what suits LoRA
    read: Callable[[Mapping[str, Any]], Recipe],  # the recipe with something on top
) -> Entry:
    if not isinstance(described, Mapping):
        raise ValueError(f"compare.methods.{key}={described!r}: expected a mapping of fields, or nothing.")
    check_keys(described, _ENTRY, f"compare.methods.{key}")
    built_in = BUILT_IN.get(key)
    on_top = {name: described[name] for name in _ON_TOP if name in described}
    if "adapter" in described or built_in is not None:
        on_top["adapter"] = _adapter(described.get("adapter", {}), built_in, recipe.adapter)
    entry_recipe = read(on_top) if on_top else recipe
    adapter = entry_recipe.adapter
    like = _most_like(adapter)
    rates = described.get("rates") or rate_grid(base_rate * like.rate)
    if not isinstance(rates, Sequence) or not all(_is_rate(rate) for rate in rates):
        raise ValueError(f"compare.methods.{key}.rates={rates!r}: expected one or more numbers above 0.")
    knob = described.get("knob", like.knob)
    size = f" {knob}={adapter[knob]}" if built_in and adapter and knob in adapter else ""
    return Entry(
        key=key,
        label=str(described.get("label", f"{built_in.label}{size}" if built_in else key)),
        recipe=entry_recipe,
        rates=tuple(sorted(float(rate) for rate in rates)),
        note=str(described.get("note", "")),
        knob=knob,
    )


def _adapter(
    described: Mapping[str, Any] | None, built_in: BuiltIn | None, of_recipe: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The fields of an entry's adapter: the recipe's targets, what is built in, the recipe's own, what is described."""
    if described is None or (built_in is not None and built_in.adapter is None):
        return None
    of_recipe = of_recipe or {}
    shared = {name: of_recipe[name] for name in _SHARED_FIELDS if name in of_recipe}
    fields = {} if built_in is None or built_in.adapter is None else dict(built_in.adapter)
    method = described.get("method", fields.get("method", of_recipe.get("method")))
    own = of_recipe if of_recipe.get("method") == method else {}
    variant = {} if built_in is None else {name: fields[name] for name in _variant_fields(built_in)}
    return {**shared, **fields, **own, **variant, **described, "method": method}


def _variant_fields(built_in: BuiltIn) -> list[str]:
    """What makes a built-in method another one than the first of its configuration: DoRA's use_dora."""
    plain = next(other.adapter for other in BUILT_IN.values() if other.method == built_in.method)
    return [name for name in built_in.adapter or () if name not in (plain or {})]


def _most_like(adapter: Mapping[str, Any] | None) -> BuiltIn:
    """The built-in method that an adapter is, whatever its size."""
    method = None if adapter is None else adapter["method"]
    alike = [
        built_in
        for built_in in BUILT_IN.values()
        if built_in.method == method
        and all((adapter or {}).get(name) == (built_in.adapter or {})[name] for name in _variant_fields(built_in))
    ]
    unknown = BuiltIn(str(method), adapter, 1, "r" if "r" in (adapter or {}) else None)
    return max(alike, key=lambda built_in: len(_variant_fields(built_in)), default=unknown)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
