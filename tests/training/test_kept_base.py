"""The base in 4 bits that a run keeps: made of what its recipe says, whatever an earlier try left in its place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("omegaconf")
pytest.importorskip("bitsandbytes")
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.kept_base import _MADE_OF
from tensorpeft.training.models import load_base, load_tokenizer
from tensorpeft.training.recipe import load_recipe

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


def test_seeds_share_a_base_but_for_one_that_is_drawn(base, tmp_path):
    first = base(tmp_path, PISSA)
    before = age(first)
    assert base(tmp_path, PISSA, seed=1) == first
    assert age(first) == before
    drawn = [base(tmp_path, DRAWN, seed) for seed in (0, 1)]
    assert drawn == [tmp_path / "base-0", tmp_path / "base-1"]
    assert not same(*drawn)
