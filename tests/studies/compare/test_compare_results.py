"""Figures of a comparison from its runs: curves, the time to a loss, the front."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("matplotlib")
pytest.importorskip("trl")
from tensorpeft.studies.compare.entries import Comparison, Entry
from tensorpeft.studies.compare.plots import _front
from tensorpeft.studies.compare.results import EntryResult, Run, common_loss, find_metrics, is_loss, steps_to
from tensorpeft.studies.compare.table import _gain_tables, legend
from tensorpeft.training.recipe import DataRecipe, Recipe
from tensorpeft.training.results import SeedResult

ENTRY = Entry("lora", "LoRA", Recipe("model", "sst2", DataRecipe("train", 10)), (1e-3, 1e-2))
COMPARISON = Comparison(ENTRY.recipe, (ENTRY,), 1, 0, None, Path("out"))


def seed_result(losses, seed=0):
    history = tuple({"step": 10 * (k + 1), "eval_loss": loss} for k, loss in enumerate(losses))
    return SeedResult(seed, history, {"loss": losses[-1]}, None, 30, {"sst2": {"accuracy": 0.5, "loss": 1.0}}, 5, 9)


def entry_result(*curves):
    runs = tuple(Run(1e-3, seed, seed_result(losses, seed)) for seed, losses in enumerate(curves))
    return EntryResult(ENTRY, runs[:1], runs, None)


def test_the_time_to_a_loss_is_where_the_line_between_two_evaluations_crosses_it():
    curve = [(10, 2.0), (20, 1.0), (30, 1.2)]
    assert steps_to(curve, 2.5) == 10
    assert steps_to(curve, 1.25) == pytest.approx(17.5)
    assert steps_to(curve, 1.0) == 20
    assert steps_to(curve, 0.9) is None


def test_the_common_loss_is_the_lowest_that_every_mean_curve_reaches():
    results = [entry_result([2.0, 1.0], [4.0, 3.0]), entry_result([5.0, 1.5, 1.8])]
    assert results[0].mean_curve() == [(10, 3.0), (20, 2.0)]
    assert common_loss(results) == 2.0
    assert common_loss([EntryResult(ENTRY, (), (), None, problem="it broke")]) is None


def test_a_run_that_failed_or_diverged_has_an_infinite_loss():
    assert Run(1e-3, 0, None, "it broke").loss == math.inf
    assert Run(1e-3, 0, seed_result([math.nan])).loss == math.inf


def test_the_main_metric_of_a_test_is_its_first_and_a_loss_is_better_lower():
    assert find_metrics([entry_result([1.0])]) == [("sst2", "accuracy")]
    assert is_loss("loss")
    assert not is_loss("accuracy")


def test_what_a_method_gains_is_told_beside_lora_seed_by_seed():
    untrained = EntryResult(
        Entry("untrained", "before training", ENTRY.recipe, ()), (), entry_result([3.0]).final, None
    )
    lora, other = entry_result([2.0], [1.8]), entry_result([2.3], [2.0])
    other = replace(other, entry=replace(ENTRY, key="lotr", label="LoTR"))
    (table,) = _gain_tables([untrained, lora, other])
    assert table.title == "Beside LoRA"
    assert table.rows == [
        ["LoRA", "1.100", "100.0%", "0.000 ± 0.000"],
        ["LoTR", "0.850", "77.3%", "0.250 ± 0.071"],
    ]
    diverged = replace(other, final=(other.final[0], Run(1e-3, 1, seed_result([math.nan], 1))))
    assert _gain_tables([untrained, lora, diverged])[0].rows[1] == ["LoTR", "diverged", "", ""]
    assert _gain_tables([lora, other]) == _gain_tables([untrained, other]) == []
    worse = replace(lora, final=entry_result([3.5]).final)
    assert _gain_tables([untrained, worse, other]) == []


def test_bounded_are_entries_that_are_trained():
    def steps(*entries):
        results = [replace(entry_result([2.0]), entry=entry) for entry in entries]
        results = [replace(result, search=result.search if result.entry.rates else ()) for result in results]
        return [line for line in legend(COMPARISON, results) if line.startswith("Steps")]

    bounded = replace(ENTRY, recipe=replace(ENTRY.recipe, max_step_kl=0.01))
    untrained = replace(bounded, key="untrained", label="before training", rates=())
    assert steps(untrained, bounded) == [
        "Steps are bounded (max_step_kl: 0.01): a rate that is too high is scaled down."
    ]
    assert steps(untrained, bounded, replace(ENTRY, label="DoTA"))[0].startswith("Steps of LoRA are bounded")
    assert steps(untrained, ENTRY) == []


def test_on_the_front_is_what_no_smaller_one_equals():
    points = [(100, 0.5), (10, 0.4), (50, 0.3), (100, 0.6), (200, 0.6)]
    assert _front(points, lower_is_better=False) == [(10, 0.4), (100, 0.6)]
    assert _front(points, lower_is_better=True) == [(10, 0.4), (50, 0.3)]
