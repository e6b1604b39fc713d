"""What a step costs: measured on batches of a few of the rows, drawn at random."""

import dataclasses

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from transformers import PreTrainedModel

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
        return costs.TrainedStep(comparison.entries[0], dataclasses.replace(splits, train=rows), tmp_path)

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


def test_a_step_is_of_all_batches_that_are_accumulated(step, monkeypatch):
    accumulated, calls = step("trainer.gradient_accumulation_steps=3"), []
    compute_loss = accumulated.trainer.compute_loss
    monkeypatch.setattr(accumulated.trainer, "compute_loss", lambda *given: calls.append(1) or compute_loss(*given))
    accumulated()
    assert len(calls) == 3


def test_a_step_checkpoints_activations_where_the_run_does(step):
    def is_checkpointing(*overrides):
        model = step(*overrides).model.get_base_model()
        return {layer.gradient_checkpointing for layer in model.model.layers}

    assert is_checkpointing() == {True}  # TRL's default
    assert is_checkpointing("trainer.gradient_checkpointing=false") == {False}
    every_second = "trainer.gradient_checkpointing_kwargs={every_n_layers: 2, use_reentrant: false}"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # transformers before that checkpoints all
        assert is_checkpointing(every_second) == {True, False}


def test_the_base_in_4_bits_is_that_of_the_cells(step, tmp_path):
    pytest.importorskip("bitsandbytes")
    step("quantize.residual=false")
    file = tmp_path / "base" / "model.safetensors"
    written = file.stat().st_mtime_ns
    step("quantize.residual=false")
    assert file.stat().st_mtime_ns == written


def test_all_seconds_are_of_one_measurement_of_the_reference(asked, tmp_path, monkeypatch):
    def measure(methods, *overrides):
        comparison = load_entries(asked / "asked.yaml", methods, overrides=overrides, output=tmp_path)
        meter = costs.CostMeter(comparison, load_splits(comparison.recipe), rounds=1)
        return {entry.key: meter.costs(entry) for entry in comparison.entries}

    assert measure("lorta")["lorta"].ratio == 0
    beside = measure("lorta,lora")
    assert beside["lora"].ratio == 1
    assert beside["lorta"].ratio > 0
    more = measure("lora,lorta,lotr")
    assert (more["lora"], more["lorta"]) == (beside["lora"], beside["lorta"])
    for found in more.values():
        assert found.step_seconds == pytest.approx(found.ratio * more["lora"].step_seconds)
    # What a step depends on is measured anew, the rate apart.
    assert measure("lora,lorta", "trainer.learning_rate=5e-3", "data.test=null") == {
        key: more[key] for key in ("lora", "lorta")
    }
    again = measure("lora,lorta", "trainer.per_device_train_batch_size=8")
    assert all(again[key].step_seconds != beside[key].step_seconds for key in again)
    monkeypatch.setattr(costs.platform, "node", lambda: "another machine")
    elsewhere = measure("lora,lorta")
    assert all(elsewhere[key].step_seconds != beside[key].step_seconds for key in elsewhere)
