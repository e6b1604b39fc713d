"""The base in 4 bits that a run keeps: made of what its recipe says, whatever an earlier try left in its place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("omegaconf")
pytest.importorskip("bitsandbytes")
from transformers import set_seed

from tensorpeft.tasks.registry import find_task
from tensorpeft.training import models
from tensorpeft.training.kept_base import _MADE_OF
from tensorpeft.training.models import adapt, load_base, load_tokenizer
from tensorpeft.training.recipe import load_recipe

DOTA = ("quantize={rounds: 2}",)
PISSA = ("adapter={method: lora, r: 4, init_lora_weights: pissa}", "quantize.residual=true")
PLAIN = ("adapter={method: lora, r: 4}", "quantize.residual=false")
DRAWN = ("adapter={method: lora, r: 4, init_lora_weights: pissa_niter_1}", "quantize.residual=true")


@pytest.fixture
def base(place):
    """The base of a recipe, kept in a folder; where an adapter finds it."""

    def make(output, overrides, seed=0) -> Path:
        recipe = load_recipe(place / "sft.yaml", [f"output={output}", *overrides])
        task = find_task(recipe.task)
        return Path(load_base(recipe, task, load_tokenizer(recipe, task), seed).name_or_path)

    return make


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights."""
    found, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def age(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_mtime_ns


def test_what_a_try_left_that_was_no_run_yet_is_replaced(base, tmp_path):
    left = base(tmp_path / "run", PISSA)
    assert left == tmp_path / "run" / "base"
    assert base(tmp_path / "run", PLAIN) == left
    assert same(left, base(tmp_path / "plain", PLAIN))
    assert not same(left, base(tmp_path / "pissa", PISSA))


def test_a_folder_that_no_run_left_is_not_removed(base, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"base: it is no base that a run here has left\. Remove it"):
        base(tmp_path, PISSA)
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["config.json"]


@pytest.mark.parametrize("run", ["recipe.yaml", "rate-0.01/recipe.yaml"])
def test_a_base_that_a_run_names_stays(run, base, tmp_path):
    kept = base(tmp_path, PISSA)
    (tmp_path / run).parent.mkdir(exist_ok=True)
    (tmp_path / run).write_text("of a run", encoding="utf-8")
    before = age(kept)
    base(tmp_path, PISSA, seed=1)
    with pytest.raises(ValueError, match=r"base: the runs here have a base with quantize: .*True.*the recipe .*False"):
        base(tmp_path, PLAIN[1:] + PISSA[:1])
    (kept / _MADE_OF).unlink()  # as earlier versions left it
    base(tmp_path, PISSA)
    assert age(kept) == before


@pytest.mark.parametrize("overrides", [DOTA, PISSA, PLAIN, DRAWN], ids=["dota", "pissa", "plain", "drawn"])
def test_a_base_that_is_kept_is_not_made_again_and_is_the_same_bit_for_bit(overrides, place, tmp_path, monkeypatch):
    recipe = load_recipe(place / "sft.yaml", [f"output={tmp_path}", *overrides])
    task, ids = find_task(recipe.task), torch.arange(4, 12)[None]
    tokenizer = load_tokenizer(recipe, task)

    def adapted():
        base = load_base(recipe, task, tokenizer, seed=0)
        set_seed(0)
        model = adapt(base, recipe, task)
        return base, model.state_dict(), {name for name, p in model.named_parameters() if p.requires_grad}, model(ids)

    made = adapted()
    monkeypatch.delattr(models, "quantize_residual")
    kept = adapted()
    assert kept[0].name_or_path == made[0].name_or_path == str(tmp_path / ("base-0" if overrides == DRAWN else "base"))
    assert kept[1].keys() == made[1].keys()
    for name, tensor in made[1].items():
        assert torch.equal(kept[1][name], tensor), name
        assert kept[1][name].dtype == tensor.dtype, name
    assert kept[2] == made[2]
    assert torch.equal(kept[3].logits, made[3].logits)
    (Path(kept[0].name_or_path) / "adapter_start.safetensors").unlink()  # as earlier versions left it
    with pytest.raises(NameError, match="quantize_residual"):
        adapted()


def test_seeds_share_a_base_but_for_one_that_is_drawn(base, tmp_path):
    first = base(tmp_path, PISSA)
    before = age(first)
    assert base(tmp_path, PISSA, seed=1) == first
    assert age(first) == before
    drawn = [base(tmp_path, DRAWN, seed) for seed in (0, 1)]
    assert drawn == [tmp_path / "base-0", tmp_path / "base-1"]
    assert not same(*drawn)
