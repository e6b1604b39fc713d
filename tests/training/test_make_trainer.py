"""The trainer of a recipe, before it runs."""

import gc
import weakref

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from tensorpeft.training import trainers
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.models import load_base, load_tokenizer
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.splits import load_splits


@pytest.fixture
def make(place, tmp_path):
    """The trainer of a recipe."""

    def make(name, *more):
        recipe = load_recipe(place / f"{name}.yaml", ["trainer.learning_rate=1e-2", *more])
        splits = load_splits(recipe)
        arguments = make_arguments(recipe.trainer, splits.task, tmp_path, 0)
        return trainers.make_trainer(recipe, splits, load_tokenizer(recipe, splits.task), arguments)

    return make


def test_a_model_that_refers_to_itself_is_gone_before_the_next_is_loaded(make, monkeypatch):
    found = []
    model = make("labels").model
    model.itself = [model]  # as in 4 bits, and in mixed precision
    last = weakref.ref(model)
    del model

    def load(*arguments):
        found.append(last())
        return load_base(*arguments)

    monkeypatch.setattr(trainers, "load_base", load)
    gc.disable()
    try:
        make("labels")
    finally:
        gc.enable()
    assert found == [None]


@pytest.mark.parametrize(("train", "evaluation"), [("false", "true"), ("true", "false"), ("true", "null")])
def test_rows_that_are_packed_are_not_left_out(train, evaluation, make, place, capsys):
    """A packed data set has fewer rows than it was given; of the other, none is lost unsaid."""
    packing = [f"trainer.packing={train}", f"trainer.eval_packing={evaluation}", "trainer.max_length=24"]
    trainer = make("sft", *packing, "trainer.bf16=false")
    are_fewer = len(trainer.train_dataset) < 32, len(trainer.eval_dataset) < 8
    assert are_fewer == (train == "true", evaluation != "false")
    trainers.tell_dropped_rows(trainer, load_splits(load_recipe(place / "sft.yaml")))
    assert "left out" not in capsys.readouterr().out
