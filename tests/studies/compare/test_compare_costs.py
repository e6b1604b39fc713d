"""What a step costs: measured on batches of a few of the rows, drawn at random."""

import dataclasses

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from tensorpeft.studies.compare import costs
from tensorpeft.studies.compare.entries import load_entries
from tensorpeft.training.splits import load_splits


@pytest.fixture
def step(asked, tmp_path, monkeypatch):
    """The step of an entry with 40 training rows, of which the 18 of the first batches, or more, are prepared."""
    monkeypatch.setattr(costs, "_NUM_ROWS", 1)

    def make(*overrides, change=lambda row: row):
        same = ["data.train_rows=40", "trainer.per_device_train_batch_size=1", *overrides]
        comparison = load_entries(asked / "asked.yaml", "lora", overrides=same, output=tmp_path)
        splits = load_splits(comparison.recipe)
        rows = [*map(change, splits.train[:-1]), splits.train[-1]]
        return costs.TrainedStep(comparison.entries[0], dataclasses.replace(splits, train=rows))

    return make


def test_as_many_rows_are_prepared_as_the_first_batches_need(step):
    assert len(step().trainer.train_dataset) == 2 * costs._NUM_BATCHES + 1


def test_rows_that_are_packed_are_all_prepared(step):
    overrides = ("trainer.packing=true", "trainer.packing_strategy=wrapped", "trainer.max_length=8")
    packed = step(*overrides).trainer.train_dataset
    few = step(*overrides, "data.train_rows=20").trainer.train_dataset
    assert len(packed) > 1.5 * len(few)


def test_a_row_that_is_not_too_long_is_among_them(step):
    chosen = step("trainer.max_length=2000", change=lambda row: dataclasses.replace(row, prompt=200 * row.prompt))
    assert len(chosen.trainer.train_dataset) == 1
    chosen()
