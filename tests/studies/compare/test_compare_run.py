"""`tensorpeft compare` from the recipe to the report, on a tiny model: cells, failures, resuming, equal size."""

import io
import json
import re
import shutil

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from evaluation.evaluated import WORDS, tiny_bert, word_tokenizer
from tensorpeft.studies.compare import cells
from tensorpeft.studies.compare.entries import load_entries
from tensorpeft.studies.compare.run import run_compare
from tensorpeft_cli import main

SECTION = """
compare:
  seeds: 2
  widenings: 0
  methods:
    full: {rates: [1e-4, 1e-3]}
    lora: {rates: [1e-3, 1e-2], adapter: {r: 2}}
    lorta: {rates: [1e-3, 1e-2], note: "a <note>"}
    broken: {rates: [1e-3, 1e-2], adapter: {method: dota, r: 4, num_cores: 3, target_modules: [nowhere]}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, rows and a recipe."""
    folder = tmp_path_factory.mktemp("compared")
    tiny_bert().bert.save_pretrained(folder / "bert")
    word_tokenizer(pairs=True).save_pretrained(folder / "bert")
    lines = [f"{' '.join(WORDS[k : k + 3])}\t{k % 2}\n" for k in range(60)]
    (folder / "labels.tsv").write_text("sentence\tlabel\n" + "".join(lines), encoding="utf-8")
    (folder / "some.yaml").write_text(
        f"model: {folder / 'bert'}\ntask: sst2\n"
        "adapter: {method: lorta, r: 4, target_modules: [query, key, value]}\n"
        f"data: {{train: {folder / 'labels.tsv'}, validation: 8, test: {folder / 'labels.tsv'}, test_rows: 6}}\n"
        "trainer: {max_steps: 4, eval_steps: 2, logging_steps: 1, per_device_train_batch_size: 4, "
        "learning_rate: 1e-2}\n" + SECTION,
        encoding="utf-8",
    )
    return folder


def compare(place, output, **arguments):
    terminal = io.StringIO()
    comparison = load_entries(place / "some.yaml", output=output, **arguments)
    return run_compare(comparison, 2, "tensorpeft compare some.yaml", terminal), terminal.getvalue()


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """The results of all entries, what was printed, and the folder."""
    output = tmp_path_factory.mktemp("output") / "new"
    return *compare(place, output), output


def test_every_entry_has_its_cells_at_its_best_rate(finished):
    results, _, output = finished
    for result in results[:3]:
        assert [run.rate for run in result.search] == list(result.entry.rates)
        best = min(result.search, key=lambda run: run.loss)
        assert [(run.rate, run.seed) for run in result.final] == [(best.rate, 0), (best.rate, 1)]
        assert result.final[0].result.validation == best.result.validation
        assert all(set(run.result.tests["sst2"]) == {"accuracy", "loss"} for run in result.final)
        assert all(not run.result.tests for run in result.search)  # the test is scored once, after the choice
        assert result.saved_bytes > 0
        assert not list((output / "entries" / result.entry.key).rglob("checkpoint-*"))
    losers = [run.rate for run in results[0].search if run.rate != results[0].rate]
    assert not (output / "entries" / "full" / f"rate-{losers[0]:g}" / "seed-0" / "model").exists()


def test_costs_are_measured_beside_the_reference(finished):
    full, lora, lorta, _ = finished[0]
    assert lora.costs.ratio == 1.0
    for result in (full, lora, lorta):
        assert result.costs.head_parameters == 24 * 2 + 2
        assert result.costs.step_seconds > 0
        assert result.costs.ratio > 0
        assert result.costs.peak_bytes > 0
    assert lora.costs.parameters == 2 * 3 * 2 * (24 + 24)
    assert lorta.final[0].result.trained_parameters == lorta.costs.parameters + 50
    assert full.saved_bytes > lora.saved_bytes


def test_what_fails_is_shown_as_failed_and_the_others_go_on(finished):
    results, printed, output = finished
    assert "NoMatchingPeftModuleError" in results[3].problem
    assert re.search(r"broken +failed", printed)
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "| broken | failed |" in report
    tree = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [entry["key"] for entry in tree["entries"]] == ["full", "lora", "lorta", "broken"]
    assert tree["entries"][3]["chosen_rate"] is None
    assert tree["entries"][1]["final"][1]["tests"]["sst2"]["accuracy"] >= 0


def test_the_table_fits_and_has_what_was_found(finished):
    results, printed, _ = finished
    assert max(map(len, printed.splitlines())) <= 110
    for result in results[:3]:
        (row,) = [line for line in printed.splitlines() if re.match(rf" *{result.entry.label} +\d", line)]
        assert f"{result.costs.parameters:,}" in row
        assert f"{result.rate:g}" in row


def test_the_html_needs_no_network_and_escapes_what_it_shows(finished):
    page = (finished[2] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "@import" not in page
    assert "url(" not in page
    assert page.count("data:image/png;base64,iVBOR") == 2
    assert "a &lt;note&gt;" in page
    assert "a <note>" not in page
    assert "tensorpeft compare some.yaml" in page
    for result in finished[0]:
        assert result.entry.label in page


def test_called_again_nothing_that_is_finished_runs_again(place, finished, monkeypatch, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(finished[2], output)
    shutil.rmtree(output / "entries" / "lora" / f"rate-{finished[0][1].rate:g}" / "seed-1")
    trained = []
    run_seed = cells.run_seed

    def counted(recipe, splits, arguments, *more):
        if not (output / arguments.output_dir / "results.json").is_file():
            trained.append(arguments.output_dir)
        return run_seed(recipe, splits, arguments, *more)

    monkeypatch.setattr(cells, "run_seed", counted)
    results, printed = compare(place, output)
    assert [path for path in trained if "broken" not in path] == [
        str(output / "entries" / "lora" / f"rate-{results[1].rate:g}" / "seed-1")
    ]
    for before, after in zip(finished[0], results):
        assert [run.loss for run in after.final] == pytest.approx([run.loss for run in before.final])
    assert re.search(r"broken +failed", printed)


def test_cells_of_another_recipe_are_not_taken_for_ones_own(place, finished):
    with pytest.raises(ValueError, match="max_steps"):
        compare(place, finished[2], overrides=["trainer.max_steps=6"])


def test_an_edge_that_is_the_best_is_gone_beyond(place, tmp_path):
    arguments = {"methods": "lorta", "overrides": ["compare.widenings=1", "compare.methods.lorta.rates=[1e-6,1e-5]"]}
    (result,), _ = compare(place, tmp_path / "run", **arguments)
    assert len(result.search) == 3
    assert result.search[0].rate < 1e-6 or result.search[-1].rate > 1e-5


def test_equal_size_sets_the_ranks(place, tmp_path):
    results, printed = compare(place, tmp_path / "run", methods="lora,lorta", budget=700, seeds=1)
    lora, lorta = results
    assert lora.costs.parameters == 576  # r = 2; 864 at r = 3 is further off
    assert lorta.costs.parameters == pytest.approx(700, abs=20)
    assert lorta.entry.label == f"LoRTA r={lorta.entry.recipe.adapter['r']}"
    assert "700 trained parameters" in printed


def test_the_command_names_what_is_wrong_in_one_line(place, capsys, tmp_path):
    assert main(["compare", str(place / "some.yaml"), "--methods", "lortaa"]) == 2
    assert "Did you mean lorta" in capsys.readouterr().err
    assert main(["compare", str(place / "none.yaml")]) == 2
    assert "no recipe" in capsys.readouterr().err
    assert main(["compare", str(place / "some.yaml"), "--timing-rounds", "-1"]) == 2
