"""The table of docs/recipes.md: each row's figures are the recipe's, and its size is what the paper prints."""

import copy
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    EsmConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

pytest.importorskip("omegaconf")
from tensorpeft.models.folding import build_folding_model
from tensorpeft.recipes import list_names
from tensorpeft.studies.compare.entries import load_entries
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.head import is_head, note_new
from tensorpeft.training.models import adapt
from tensorpeft.training.recipe import load_recipe

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
COLUMNS = ["paper", "row", "recipe", "rank", "rate", "batch", "epochs", "tokens", "rows", "trained", "in the paper"]


def rows_of_the_page() -> list[dict[str, str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.search(r"`(train|compare) ", line)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


ROWS = rows_of_the_page()


def cases(is_thorough):
    """A row each, by its command."""
    marks = [[pytest.mark.thorough] if is_thorough(row) else [] for row in ROWS]
    ids = [row["recipe"].strip("`").replace(" ", "_") for row in ROWS]
    return pytest.mark.parametrize("row", [pytest.param(r, marks=m, id=i) for r, m, i in zip(ROWS, marks, ids)])


def recipe_of(row):
    """The recipe that the row's command runs, and the rates that it chooses among."""
    command, name, *rest = shlex.split(row["recipe"].strip("`"))
    if command == "compare":
        (entry,) = load_entries(name, methods=rest[rest.index("--methods") + 1]).entries
        return entry.recipe, entry.rates
    recipe = load_recipe(name, rest)
    return recipe, (recipe.trainer["learning_rate"],)


@cache
def base_of(name: str) -> nn.Module:
    """The model without its numbers."""
    small = {"vocab_size": 32000, "intermediate_size": 11008}
    large = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
    with torch.device("meta"):
        if "lama" in name:
            sizes = small if "Llama-2" in name else large
            return LlamaForCausalLM(LlamaConfig(hidden_size=4096, num_hidden_layers=32, **sizes))
        if "roberta" in name:
            wide = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
            config = RobertaConfig(vocab_size=50265, num_labels=2, **(wide if "large" in name else {}))
            return RobertaForSequenceClassification(config)
        assert "esm2_t12_35M" in name
        width = {"hidden_size": 480, "num_hidden_layers": 12, "num_attention_heads": 20, "intermediate_size": 1920}
        tokens = {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary"}
        model = build_folding_model(EsmConfig(**width, **tokens), num_blocks=1)
        note_new(model, [f"head.{name}" for name, _ in model.head.named_parameters()])
        return model


def count(recipe) -> tuple[int, int]:
    """Trained parameters and all of them, a head apart that is trained whole: so the papers count."""
    key = f"{recipe.model} {recipe.adapter} {recipe.head}"
    if key not in COUNTED:
        base = copy.deepcopy(base_of(recipe.model))
        with torch.device("meta"):
            model = adapt(base, recipe, find_task(recipe.task))
        counts = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        trained = sum(n for name, n in counts.items() if recipe.head is not None or not is_head(name, model))
        COUNTED[key] = trained, sum(p.numel() for p in model.parameters())
    return COUNTED[key]


COUNTED: dict[str, tuple[int, int]] = {}  # figures share adapters


def rounded_as(text: str, trained: int, whole: int) -> str:
    """The count as a text such as 0.83 %, 48k or 0.51M has it."""
    number, unit = re.fullmatch(r"([\d.]+)\s*(%|k|M)", text).groups()
    value = {"%": 100 * trained / whole, "k": trained / 1e3, "M": trained / 1e6}[unit]
    decimals = len(number.partition(".")[2])
    return f"{value:.{decimals}f}{text[len(number) :]}"


def figures(recipe, rates) -> dict[str, str]:
    """What the page says of a recipe, as it says it."""
    trainer, data = recipe.trainer, recipe.data
    epochs = trainer.get("num_train_epochs", f"{trainer.get('max_steps', 0):,} steps")
    train = "all" if data.train_rows is None else f"{data.train_rows:,}"
    sign = "-" if data.train_rows is None else "+"
    return {
        "rank": "-" if recipe.adapter is None else str(recipe.adapter["r"]),
        "rate": "chosen" if len(rates) > 1 else f"{rates[0]:.0e}".replace("e-0", "e-"),
        "batch": str(trainer["per_device_train_batch_size"]),
        "epochs": str(epochs),
        "tokens": str(data.max_length or trainer.get("max_length", "-")),
        "rows": f"{train} {sign} {data.validation:,}" if isinstance(data.validation, int) else train,
    }


@cases(is_thorough=lambda row: False)
def test_a_row_says_what_its_recipe_does(row):
    expected = figures(*recipe_of(row))
    assert {column: row[column].replace("*", "") for column in expected} == expected


@cases(is_thorough=lambda row: "llama" in row["recipe"] or "Figure" in row["paper"])
def test_a_row_counts_what_its_recipe_trains(row):
    recipe, _ = recipe_of(row)
    if recipe.adapter is None:
        assert row["trained"] == "all"
        assert row["in the paper"] in ("-", "100 %")
        return
    trained, whole = count(recipe)
    assert row["trained"] == f"{trained:,}"
    printed = row["in the paper"]
    if printed.startswith("not "):  # the page says why
        assert rounded_as(printed.removeprefix("not "), trained, whole) != printed.removeprefix("not ")
    elif printed != "-":
        assert rounded_as(printed, trained, whole) == printed


def test_every_recipe_of_a_paper_is_on_the_page():
    papers = [name for name in list_names() if name.split("/")[0] in ("dota", "qdota", "lorta", "loretta", "lotr")]
    assert {row["recipe"].split()[1].strip("`") for row in ROWS} >= set(papers)
