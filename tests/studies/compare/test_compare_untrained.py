"""The model before training stands beside the trained ones: its scores, its answers, and what to do next."""

import io
import json

import pytest
from peft import get_peft_model

from cases import CASES, MODELS

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.loading.adapters import load_model
from tensorpeft.networks.update import AbstractFactoredUpdate, AbstractOutputUpdate, AbstractUpdate
from tensorpeft.studies.catalogue import NOT_LINEAR, OF_HIGH_RANK
from tensorpeft.studies.compare.entries import load_entries
from tensorpeft.studies.compare.run import run_compare
from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.sources import load_examples


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "run"
    terminal = io.StringIO()
    comparison = load_entries(asked / "asked.yaml", output=output)
    return run_compare(comparison, 0, "tensorpeft compare asked.yaml", terminal), terminal.getvalue(), output


def test_the_first_row_is_the_model_as_it_was(finished, asked):
    results, printed, output = finished
    untrained, lora, _ = results
    assert untrained.entry.label == "before training"
    assert not untrained.has_failed
    assert untrained.costs is None
    (run,) = untrained.final
    assert run.result.trained_parameters == 0
    task = find_task("signatures")
    model, tokenizer = load_model(str(asked / "llama"), None, task)
    examples = load_examples(task, "stdlib:test")[:5]
    found = evaluate_task(model, tokenizer, task, examples, EvaluationOptions(max_new_tokens=6))
    written = output / "entries" / "untrained" / "rate-0" / "seed-0" / "predictions-signatures.jsonl"
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [row["generated"] for row in rows] == [row["generated"] for row in found.rows]
    assert run.result.tests["signatures"] == pytest.approx(found.metrics)
    assert run.loss > lora.final[0].loss
    row = next(line for line in printed.splitlines() if line.lstrip().startswith("before training  "))
    assert f"{run.loss:.3f}" in row
    assert "0.01*" not in printed  # one rate of one has no edge
    assert "*: the best rate" not in printed


def test_answers_stand_side_by_side_where_a_person_looks(finished):
    _, printed, output = finished
    assert printed.count("    expected ") == 4
    assert printed.index("    expected ") < printed.index("Scores: test rows")
    for label in ("before training", "LoRA r=2", "LoRTA r=16"):
        assert sum(line[4:].startswith(label) for line in printed.splitlines()) == 4
    for report in ("report.md", "report.html"):
        text = (output / report).read_text(encoding="utf-8")
        assert "Answers" in text
        assert text.count("Write the arguments of this function") == 5
    tree = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [entry["key"] for entry in tree["entries"]] == ["untrained", "lora", "lorta"]


def test_the_next_commands_name_the_adapter_of_the_lowest_loss(finished):
    results, printed, output = finished
    best = min(results[1:], key=lambda result: result.losses()[0])
    adapter = output / "entries" / best.entry.key / f"rate-{best.rate:g}" / "seed-0" / "adapter"
    assert (adapter / "adapter_config.json").is_file()
    assert f"Next, with {best.entry.label}:" in printed
    is_lora = best.entry.key == "lora"  # PEFT's own is one already
    for command in ("chat", "export lora", "export gguf", "export dense"):
        assert (f"tensorpeft {command} {adapter}" in printed) != (is_lora and command in ("export lora", "export gguf"))


def test_what_is_suggested_of_an_adapter_is_what_its_updates_can_be():
    by_key = {case.make(target_modules=["x"]).peft_type.value.lower(): case for case in CASES}
    for method, case in by_key.items():
        model = get_peft_model(MODELS[0].fresh(), case.make(target_modules=MODELS[0].targets))
        kinds = {module for module in model.modules() if isinstance(module, AbstractUpdate)}
        assert kinds
        assert all(isinstance(kind, AbstractFactoredUpdate) for kind in kinds) == (
            method not in (*OF_HIGH_RANK, *NOT_LINEAR)
        )
        assert all(isinstance(kind, AbstractOutputUpdate) for kind in kinds) == (method in NOT_LINEAR)


def test_called_again_it_is_not_tested_again(finished, asked, monkeypatch):
    from tensorpeft.studies.compare import cells

    results, _, output = finished
    monkeypatch.setattr(cells, "_run", None)
    again = run_compare(load_entries(asked / "asked.yaml", output=output), 0, "", io.StringIO())
    assert [run.loss for run in again[0].final] == [run.loss for run in results[0].final]


def test_called_again_the_model_before_training_has_no_start_from_gradients(asked, tmp_path):
    comparison = load_entries(asked / "asked.yaml", "lora", overrides=["data.start_rows=4"], output=tmp_path / "run")
    first, second = (run_compare(comparison, 0, "", io.StringIO()) for _ in range(2))
    assert [run.loss for run in second[0].final] == [run.loss for run in first[0].final]


def test_tests_that_are_added_later_test_what_is_trained_already(finished, asked, tmp_path, monkeypatch):
    from tensorpeft.studies.compare import cells

    def run(*overrides):
        comparison = load_entries(asked / "asked.yaml", output=tmp_path / "run", overrides=overrides)
        return run_compare(comparison, 0, "", io.StringIO())

    without_test = run("data.test=null", "data.test_rows=null", "evaluate={}")
    assert not any(run.result.tests for result in without_test for run in result.final)
    monkeypatch.setattr(cells, "run_seed", None)
    with_test = run()
    assert [result.entry.label for result in with_test][1:] == [result.entry.label for result in without_test]
    for one, other in zip(with_test, finished[0]):
        assert one.final[0].result.tests == other.final[0].result.tests
        assert one.losses() == other.losses()
    with pytest.raises(ValueError, match="the run has data"):
        run("data.test_rows=4")
