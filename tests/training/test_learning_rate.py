"""A recipe that names no learning rate."""

from dataclasses import replace

import pytest
from transformers import TrainingArguments

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from tensorpeft.training.learning_rate import with_learning_rate
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.run import run_training

EXACT = ["trainer.bf16=false", "trainer.gradient_checkpointing=false"]


def test_a_rate_that_is_not_named_is_filled_in_and_its_steps_are_bounded(place):
    recipe = load_recipe(place / "sft.yaml")
    filled = with_learning_rate(recipe)
    assert filled == replace(recipe, trainer={**recipe.trainer, "learning_rate": 0.1}, max_step_kl=0.01)
    nothing = load_recipe(place / "sft.yaml", ["trainer.learning_rate=null"])
    assert with_learning_rate(nothing) == filled
    mine = load_recipe(place / "sft.yaml", ["max_step_kl=0.05"])
    assert with_learning_rate(mine).max_step_kl == 0.05


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("sft", "trainer.learning_rate=1e-5"),
        ("sft", "adapter=null"),
        ("sft", "trainer.fsdp=[full_shard]"),
        ("sft", "rewards={format: 1}"),
        ("dpo", "seeds=[0]"),
        ("labels", "seeds=[0]"),
    ],
)
def test_where_it_was_not_measured_the_libraries_rate_holds(name, override, place):
    recipe = load_recipe(place / f"{name}.yaml", [override])
    assert with_learning_rate(recipe) is recipe


@pytest.mark.parametrize("what", ["FSDP", "DEEPSPEED"])
def test_what_accelerate_shards_has_the_libraries_rate(what, place, monkeypatch):
    recipe = load_recipe(place / "sft.yaml")
    assert with_learning_rate(recipe) is not recipe
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    assert with_learning_rate(recipe) is recipe


def test_a_run_without_a_rate_says_which_it_took(place, tmp_path, capsys):
    recipe = load_recipe(place / "sft.yaml", [*EXACT, f"output={tmp_path / 'run'}"])
    (result,) = run_training(recipe)
    printed = " ".join(capsys.readouterr().out.split())
    assert "No trainer.learning_rate is given: 0.1, and steps are bounded (max_step_kl: 0.01)." in printed
    assert dict(result.curve("rate_scale"))
    assert 0 < max(rate for _, rate in result.curve("learning_rate")) <= 0.1
    assert load_recipe(tmp_path / "run/recipe.yaml") == with_learning_rate(recipe)
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert "Steps are bounded (max_step_kl: 0.01)" in report
    # The same command goes on, and it is the run at that rate to the last bit.
    assert run_training(recipe, resume=True) == [result]
    capsys.readouterr()
    said = [*EXACT, "trainer.learning_rate=0.1", "max_step_kl=0.01", f"output={tmp_path / 'said'}"]
    (named,) = run_training(load_recipe(place / "sft.yaml", said))
    assert named.curve("loss") == result.curve("loss")
    assert "No trainer.learning_rate" not in capsys.readouterr().out


def test_a_rate_of_the_libraries_own_is_left_and_nothing_is_said(place, tmp_path, capsys):
    recipe = load_recipe(place / "labels.yaml", ["trainer.bf16=false", f"output={tmp_path}"])
    (result,) = run_training(recipe)
    assert max(rate for _, rate in result.curve("learning_rate")) == TrainingArguments("x").learning_rate
    assert not result.curve("rate_scale")
    assert "learning_rate" not in capsys.readouterr().out
