"""What is compared: entries that are each the recipe with something put on top, and a grid of learning rates."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tensorpeft.studies.budget import parse_count
from tensorpeft.studies.catalogue import DEFAULT_COMPARED, Method, all_like, methods_by_key, most_like, variant_fields
from tensorpeft.studies.rates import rate_grid
from tensorpeft.training.adapters import make_config
from tensorpeft.training.fields import is_number
from tensorpeft.training.learning_rate import BOUNDED_RATE, MAX_STEP_KL, can_be_bounded, with_learning_rate
from tensorpeft.training.models import has_rounds, starts_in_base
from tensorpeft.training.recipe import SMOKE_ENDING, Recipe, check_keys, load_comparison, load_recipe, without_adapter

# What of the recipe's adapter every other method is given too: which weights are adapted, which modules are trained.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_KEPT_MODULES = ("modules_to_save",)
_SECTION = ("seeds", "methods", "rate_scale", "max_step_kl", "budget", "target_loss", "widenings", "output")
_ON_TOP = ("trainer", "quantize", "model_arguments", "max_step_kl", "head_learning_rate", "head")
# Where no rates are named and steps are bounded, the rate is so many times the usual one: what is too high is scaled
# down.
_ABOVE = 10
_WITHOUT_FULL = (
    "Full fine-tuning is left out: its steps are not bounded, so it needs a rate that is searched "
    "(trainer.learning_rate=…)."
)
_ENTRY = ("label", "note", "rates", "knob", "adapter", "start_rows", *_ON_TOP)


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Args:
        key: how ``--methods`` calls it, and its folder.
        label: how tables and plots call it.
        recipe: what is run, but for the learning rate and the seed.
        rates: learning rates to choose from, ascending; none: it is not trained.
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
        note: what a reader of the table must know of the choice of entries.
    """

    recipe: Recipe
    entries: tuple[Entry, ...]
    seeds: int
    widenings: int
    target_loss: float | None
    output: Path
    budget: int | None = None
    note: str = ""


def entry_folder(output: Path, entry: Entry) -> Path:
    """Where the cells of an entry, its costs and what they share are kept, in a comparison's folder."""
    return output / "entries" / entry.key


def with_untrained(comparison: Comparison) -> Comparison:
    """The comparison with the model before training as its first entry."""
    untrained = Entry("untrained", "before training", without_adapter(comparison.recipe), rates=())
    return replace(comparison, entries=(untrained, *comparison.entries))


def load_entries(
    path: str | Path,
    methods: str | None = None,  # such as "dota,lora"; None: the recipe's, or `DEFAULT_COMPARED`
    seeds: int | None = None,  # None: the recipe's, or 3
    overrides: Sequence[str] = (),  # of the recipe, as `load_recipe` takes them
    smoke: bool = False,
    output: Path | None = None,  # None: the recipe's, or runs/compare/RECIPE; another one with ``smoke``
    budget: int | None = None,  # trained parameters of every entry; None: the recipe's, or as the entries are
    target_loss: float | None = None,  # None: the recipe's, or the lowest that all reach
) -> Comparison:
    """The comparison that a recipe and the command's options describe.

    The recipe's section ``compare`` may have ``methods`` ({key: null, or a part of a recipe with ``label``, ``rates``,
    ``note``, ``knob`` and ``start_rows``}), ``seeds``, ``rate_scale``, ``max_step_kl``, ``budget`` (such as 50k),
    ``widenings``, ``target_loss`` and ``output``. A key of the catalogue begins with what is there; an adapter of the
    recipe's own method begins with the recipe's; every adapter has the recipe's targets.

    Without ``rates``, the steps of an entry are bounded (`tensorpeft.BoundedSteps`, ``max_step_kl``: 0.01), and it has
    one rate, ten times what its method wants of the recipe's (0.1 for all where the recipe names none and
    `with_learning_rate` knows one): one that is too high is scaled down. Where the model gets
    a new head, all weights are trained or lie in shards, or with ``max_step_kl: null``, it chooses among three: what
    its method wants, and √10 below and above. Of one rate nothing is chosen.

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
    # Each is the name of a folder.
    if wrong := [key for key in described if not re.fullmatch(r"[\w+-][\w.+-]*", str(key))]:
        raise ValueError(f"{path}: compare.methods.{wrong[0]}: expected a name of letters, digits and - . _ +.")
    keys = [key.strip() for key in methods.split(",")] if methods is not None else list(described or DEFAULT_COMPARED)
    without_full = methods is None and not described and recipe.trainer.get("learning_rate") is None
    if without_full:
        keys.remove("full")
    catalogue = methods_by_key()
    check_keys(keys, {**described, **catalogue}, "methods")
    if len(set(keys)) < len(keys):
        raise ValueError(f"methods={','.join(keys)}: one is there twice. Give each once.")
    bound = section.get("max_step_kl", MAX_STEP_KL)
    if bound is not None and not is_number(bound, above=0):
        raise ValueError(f"compare.max_step_kl={bound!r}: expected nats above 0, such as 0.01, or null.")
    rate = recipe.trainer.get("learning_rate")
    if rate is not None and not is_number(rate, above=0):
        raise ValueError(f"{path}: trainer.learning_rate={rate!r}: expected a number above 0, for grids to begin from.")
    scale = section.get("rate_scale", 1)
    if not is_number(scale, above=0):
        raise ValueError(f"compare.rate_scale={scale!r}: expected a number above 0, which rates are multiplied by.")
    base_rate = None if rate is None else rate * scale / most_like(recipe.adapter).rate
    if missing := [key for key in keys if key not in catalogue and described.get(key) is None]:
        raise ValueError(f"{path}: compare.methods.{missing[0]} is empty, and the catalogue has no such method.")
    read = partial(load_recipe, path, overrides, smoke)
    entries = tuple(_make_entry(key, described.get(key) or {}, recipe, base_rate, bound, read) for key in keys)
    wanted = seeds if seeds is not None else section.get("seeds", 3)
    for name, value, least in (("seeds", wanted, 1), ("widenings", section.get("widenings", 2), 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 1000:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}, and at most 1000.")
    folder = section.get("output")
    if folder is None:
        folder = f"runs/compare/{Path(path).stem}{SMOKE_ENDING if smoke else ''}"
    if not isinstance(folder, str) or not folder.strip():
        raise ValueError(f"compare.output={folder!r}: expected a folder.")
    target = target_loss if target_loss is not None else section.get("target_loss")
    if target is not None and not is_number(target):
        raise ValueError(f"compare.target_loss={target!r}: expected a number, or null.")
    return Comparison(
        recipe=recipe,
        entries=entries,
        seeds=wanted,
        widenings=section.get("widenings", 2),
        target_loss=target,
        budget=budget if budget is not None or "budget" not in section else parse_count(str(section["budget"])),
        output=output or Path(folder),
        note=_WITHOUT_FULL if without_full else "",
    )


def _make_entry(
    key: str,
    described: Any,
    recipe: Recipe,
    base_rate: float | None,  # what suits LoRA; None: the recipe names no rate
    bound: float | None,  # on its steps, where it names no rates
    read: Callable[[Mapping[str, Any]], Recipe],  # the recipe with something on top
) -> Entry:
    if not isinstance(described, Mapping):
        raise ValueError(f"compare.methods.{key}={described!r}: expected a mapping of fields, or nothing.")
    check_keys(described, _ENTRY, f"compare.methods.{key}")
    method = methods_by_key().get(key)
    if not isinstance(described.get("adapter"), Mapping | None):
        raise ValueError(
            f"compare.methods.{key}.adapter={described['adapter']!r}: expected a mapping of fields, or null."
        )
    trainer = described.get("trainer")
    if isinstance(trainer, Mapping) and "learning_rate" in trainer:
        raise ValueError(f"compare.methods.{key}.trainer.learning_rate: an entry says this with rates. Write it there.")
    on_top = {name: described[name] for name in _ON_TOP if name in described}
    if "quantize" in described or (method is not None and method.quantize is not None):
        on_top["quantize"] = _quantize(described.get("quantize", {}), method, recipe.quantize)
    start_rows = described.get("start_rows", method.start_rows if method is not None else None)
    if start_rows is not None or recipe.data.start_rows is not None:
        on_top["data"] = {"start_rows": start_rows}
    if "adapter" in described or method is not None:
        on_top["adapter"] = _adapter(described.get("adapter", {}), method, recipe.adapter)
    entry_recipe = read(on_top) if on_top else recipe
    adapter = entry_recipe.adapter
    if adapter is not None and "adapter" in on_top:
        # Put on top, the fields were merged with the recipe's, of which some are not the entry's.
        adapter = {name: value for name, value in adapter.items() if name in (on_top["adapter"] or {})}
        entry_recipe = replace(entry_recipe, adapter=adapter)
    if adapter is None:
        if own := [name for name in ("quantize", "head", "start_rows") if described.get(name) is not None]:
            raise ValueError(f"compare.methods.{key}.{own[0]}: all weights are trained, without an adapter. Remove it.")
        entry_recipe = without_adapter(entry_recipe)
    else:
        entry_recipe = _with_its_base(entry_recipe, on_top.get("quantize"), recipe)
    like = most_like(adapter)
    rates = described.get("rates")
    usual = None if base_rate is None else base_rate * like.rate
    if not rates and bound is not None and can_be_bounded(entry_recipe):
        if entry_recipe.max_step_kl is None and "max_step_kl" not in described:
            entry_recipe = replace(entry_recipe, max_step_kl=float(bound))
        if entry_recipe.max_step_kl is not None:
            if usual is not None:
                rates = rate_grid(_ABOVE * usual, 1)
            elif with_learning_rate(entry_recipe) is not entry_recipe:
                rates = (BOUNDED_RATE,)
    if not rates:
        if usual is None:
            raise ValueError(
                f"trainer.learning_rate=None: expected a number, for the rates of {key} to begin from. Name one, or "
                f"compare.methods.{key}.rates."
            )
        rates = rate_grid(usual)
    if not isinstance(rates, Sequence) or not all(is_number(rate, above=0) for rate in rates):
        raise ValueError(f"compare.methods.{key}.rates={rates!r}: expected a list of numbers above 0.")
    knob = described.get("knob", like.knob)
    size = f" {knob}={adapter[knob]}" if method and adapter and knob in adapter else ""
    return Entry(
        key=key,
        label=str(described.get("label", f"{method.label}{size}" if method else key)),
        recipe=entry_recipe,
        rates=tuple(sorted(float(rate) for rate in rates)),
        note=str(described.get("note", method.note if method else "")),
        knob=knob,
    )


def _adapter(
    described: Mapping[str, Any] | None, method: Method | None, of_recipe: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The fields of an entry's adapter: the recipe's targets, the catalogue's, the recipe's own, what is described."""
    if described is None or (method is not None and method.adapter is None):
        return None
    of_recipe = of_recipe or {}
    names = _KEPT_MODULES if method and method.has_own_targets else (*_TARGETS, *_KEPT_MODULES)
    shared = {name: of_recipe[name] for name in names if name in of_recipe}
    fields = {} if method is None or method.adapter is None else dict(method.adapter)
    name = described.get("method", fields.get("method", of_recipe.get("method")))
    own = dict(of_recipe) if of_recipe.get("method") == name else {}
    if method is not None:
        # The recipe's may be another variant of it: a LoRA beside a recipe of PiSSA starts as LoRA does.
        for other in all_like(own) if own else ():
            for field in variant_fields(other):
                own.pop(field, None)
        own |= {field: fields[field] for field in variant_fields(method)}
    return {**shared, **fields, **own, **described, "method": name}


def _quantize(described: Any, method: Method | None, of_recipe: Mapping[str, Any] | None) -> Any:
    """What an entry says of its base: the catalogue's, and what is described.

    Rounds are of a base without a start: of such a one the entry is, if the recipe's is another.
    """
    if not isinstance(described, Mapping):  # null: weights that are not in 4 bits; others are refused as the recipe's
        return described
    said = {**((method.quantize if method is not None else None) or {}), **described}
    is_other = not (of_recipe or {}).get("residual", True)
    return {"residual": True, **said} if "rounds" in said and is_other else said


def _with_its_base(
    recipe: Recipe,  # of the entry
    said: Mapping[str, Any] | None,  # what the entry says of its base; None: nothing
    of_all: Recipe,
) -> Recipe:
    """The recipe without what of the 4-bit base of all its adapter cannot have and the entry has not asked for.

    That is weights that lack a start which it has not: plain NF4, QLoRA's base, stands for them; and rounds, but for an
    adapter that is the recipe's own, where they are refused.
    """
    if recipe.quantize is None:
        return recipe
    quantize, config = dict(recipe.quantize), make_config(recipe.adapter or {}, None)
    if said is None and quantize.get("residual", True) and not starts_in_base(config):
        quantize["residual"] = False
    is_own = most_like(recipe.adapter) == most_like(of_all.adapter)
    takes_rounds = quantize.get("residual", True) and (has_rounds(config) or is_own)
    if not takes_rounds and "rounds" not in (said or {}):
        quantize.pop("rounds", None)
    return replace(recipe, quantize=quantize)
