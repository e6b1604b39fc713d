"""`tensorpeft train` from the recipe to the report, on tiny models; on real data: tests/recipes."""

import dataclasses
import functools
import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from evaluation.evaluated import WORDS, tiny_bert
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.run import run_evaluate
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.results import read_result
from tensorpeft.training.run import run_training
from tensorpeft_cli import main

long = pytest.mark.recipes
RATES = {"trainer.learning_rate": "1e-2", "trainer.bf16": "false", "trainer.gradient_checkpointing": "false"}


def train(place, name, output, *overrides, resume=False):
    rates = [f"{key}={value}" for key, value in RATES.items() if name != "labels" or "checkpointing" not in key]
    recipe = load_recipe(place / f"{name}.yaml", [*rates, f"output={output}", *overrides])
    return run_training(recipe, resume)


def losses(result):
    return dict(result.curve("loss"))


@pytest.mark.parametrize("name", ["sft", pytest.param("dpo", marks=long), pytest.param("labels", marks=long)])
def test_a_run_leaves_its_adapter_curves_and_report(name, place, tmp_path):
    (result,) = train(place, name, tmp_path / "run")
    folder = tmp_path / "run"
    assert sorted(losses(result)) == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in result.curve("eval_loss")] == [2, 4, 6]
    assert result.validation["loss"] == pytest.approx(min(loss for _, loss in result.curve("eval_loss")), abs=1e-6)
    assert result.best_step in (2, 4, 6)
    assert read_result(folder / "seed-0" / "results.json") == result
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert f"{result.validation['loss']:.4f}" in report
    assert f"{result.trained_parameters:,}" in report
    predictions = next((folder / "seed-0").glob("predictions-*.jsonl")).read_text(encoding="utf-8").splitlines()
    assert len(predictions) == 6
    assert not list((folder / "seed-0" / "adapter").glob("*.bin"))
    assert load_recipe(folder / "recipe.yaml") == load_recipe(
        place / f"{name}.yaml",
        [f"{k}={v}" for k, v in RATES.items() if name != "labels" or "checkpointing" not in k] + [f"output={folder}"],
    )


@long
def test_the_saved_adapter_is_the_best_checkpoint(place, tmp_path):
    # The loss falls, so that the first checkpoint, not the last, has the greatest.
    (result,) = train(place, "sft", tmp_path / "run", "trainer.greater_is_better=true", "trainer.save_total_limit=9")
    seed = tmp_path / "run" / "seed-0"
    saved, best = (
        AutoPeftModelForCausalLM.from_pretrained(seed / name).state_dict()
        for name in ("adapter", f"checkpoint-{result.best_step}")
    )
    assert all(torch.equal(saved[key], best[key]) for key in best)
    assert result.best_step == 2


@long
def test_leaks_are_printed_and_reported(place, tmp_path, capsys):
    train(place, "sft", tmp_path / "run")  # its test rows are the training file's
    assert "of 6 test (instructions) rows are training rows, too" in " ".join(capsys.readouterr().out.split())
    assert "rows are training rows, too" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["sft", pytest.param("dpo", marks=long), pytest.param("labels", marks=long)])
def test_a_run_goes_on_at_its_last_whole_checkpoint(name, place, tmp_path):
    (whole,) = train(place, name, tmp_path / "whole", "trainer.save_total_limit=9")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    seed = tmp_path / "killed" / "seed-0"
    (seed / "results.json").unlink()
    shutil.rmtree(seed / "checkpoint-6")
    (seed / "checkpoint-4" / "trainer_state.json").write_text('{"half', encoding="utf-8")  # killed while writing
    (resumed,) = train(place, name, tmp_path / "killed", "trainer.save_total_limit=9", resume=True)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    assert dict(resumed.curve("eval_loss")) == pytest.approx(dict(whole.curve("eval_loss")), abs=1e-6)
    assert resumed.tests == whole.tests


@pytest.mark.parametrize("lost", [[], ["checkpoint-6"]], ids=["after its last step", "before it"])
def test_the_best_checkpoint_is_found_again_though_the_best_step_was_not_saved(lost, place, tmp_path, monkeypatch):
    found = {1: 9.0, 2: 3.0, 3: 4.0, 4: 5.0, 5: 2.0, 6: 6.0}
    choose = Trainer._determine_best_metric
    monkeypatch.setattr(
        Trainer,
        "_determine_best_metric",
        lambda self, metrics, trial: choose(self, {**metrics, "eval_loss": found[self.state.global_step]}, trial),
    )
    more = ["trainer.eval_steps=1", "trainer.save_steps=2", "trainer.save_total_limit=9"]
    (whole,) = train(place, "sft", tmp_path / "run", *more)
    seed = tmp_path / "run" / "seed-0"
    kept = load_file(seed / "adapter" / "adapter_model.safetensors")
    (seed / "results.json").unlink()
    for name in ("adapter", *lost):
        shutil.rmtree(seed / name)
    (resumed,) = train(place, "sft", tmp_path / "run", *more, resume=True)
    assert (whole.best_step, resumed.best_step) == (2, 2)
    assert resumed.validation == whole.validation
    saved = load_file(seed / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())


def test_a_bounded_run_tells_its_scale_and_goes_on_with_it(place, tmp_path):
    bounded = ("max_step_kl=1e-5", "trainer.learning_rate=1.0", "trainer.save_total_limit=9")
    (whole,) = train(place, "sft", tmp_path / "run", *bounded)
    scales = dict(whole.curve("rate_scale"))
    assert scales[1] == 1
    assert 0 < scales[6] < 0.5
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert f"(max_step_kl: 1e-05): the factor on the schedule's learning rate was {min(scales.values()):.2g}" in report
    seed = tmp_path / "run" / "seed-0"
    (seed / "results.json").unlink()
    shutil.rmtree(seed / "checkpoint-6")
    (resumed,) = train(place, "sft", tmp_path / "run", *bounded, resume=True)
    assert dict(resumed.curve("rate_scale")) == pytest.approx(scales)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


def test_labels_in_accumulated_batches_train_on_the_mean_of_all(place, tmp_path):
    """A classifier's loss is a mean already, whatever transformers makes of its forward's **kwargs."""
    same = ("model_arguments={hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}", "trainer.max_grad_norm=1e-3")
    (whole,) = train(place, "labels", tmp_path / "whole", *same)
    halves = ("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2")
    (accumulated,) = train(place, "labels", tmp_path / "halves", *same, *halves)
    assert losses(accumulated) == pytest.approx(losses(whole), abs=1e-5)
    assert dict(accumulated.curve("grad_norm")) == pytest.approx(dict(whole.curve("grad_norm")), rel=1e-3)
    assert dict(accumulated.curve("eval_loss")) == pytest.approx(dict(whole.curve("eval_loss")), abs=1e-5)


@long
def test_finished_seeds_are_not_run_again(place, tmp_path):
    first = train(place, "labels", tmp_path / "run", "seeds=[3]")
    state = tmp_path / "run" / "seed-3" / "adapter" / "adapter_model.safetensors"
    written = state.stat().st_mtime_ns
    both = train(place, "labels", tmp_path / "run", "seeds=[3,4]", resume=True)
    assert state.stat().st_mtime_ns == written
    assert both[0] == first[0]
    assert losses(both[1]) != losses(both[0])
    assert " ± " in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_a_run_is_not_written_over(place, tmp_path):
    train(place, "labels", tmp_path / "run", "trainer.max_steps=2")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(FileExistsError, match="--resume"):
        train(place, "labels", tmp_path / "run", "trainer.max_steps=2")
    with pytest.raises(ValueError, match=r"the run has trainer.*max_steps': 2.*the recipe.*max_steps': 3"):
        train(place, "labels", tmp_path / "run", "trainer.max_steps=3", resume=True)
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")) == before


def test_names_that_are_markup_or_move_a_terminal_are_shown_as_they_are(place, tmp_path, capsys):
    odd = tmp_path / "[/b] [red]a|b \x1b[31mc"
    shutil.copytree(place / "bert", odd / "a|b[/i]")
    recipe = load_recipe(place / "labels.yaml", ["trainer.max_steps=1", "trainer.eval_steps=1", "data.test=null"])
    run_training(dataclasses.replace(recipe, model=str(odd / "a|b[/i]"), output=str(odd / "run")))
    printed = capsys.readouterr().out
    assert "[/b] [red]a|b c" in printed
    assert "\x1b" not in printed
    assert "a|b[/i]" in (odd / "run" / "report.md").read_text(encoding="utf-8").splitlines()[0]


def test_the_head_has_its_own_rate(place, tmp_path):
    from tensorpeft.training.arguments import make_arguments
    from tensorpeft.training.models import load_tokenizer
    from tensorpeft.training.splits import load_splits
    from tensorpeft.training.trainers import make_trainer

    recipe = load_recipe(place / "labels.yaml", ["head_learning_rate=0.5", "trainer.weight_decay=0.1"])
    splits = load_splits(recipe)
    arguments = make_arguments(recipe.trainer, splits.task, tmp_path, 0)
    trainer = make_trainer(recipe, splits, load_tokenizer(recipe, splits.task), arguments)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    rates = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(rates) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {rate for name, (rate, _) in rates.items() if "classifier" in name} == {0.5}
    assert {rate for name, (rate, _) in rates.items() if "classifier" not in name} == {arguments.learning_rate}
    assert {decay for name, (_, decay) in rates.items() if name.endswith("bias")} == {0.0}


def test_rows_to_classify_are_cut_in_the_tests_as_in_training(place, tmp_path):
    (result,) = train(place, "labels", tmp_path / "run", "data.max_length=4", "trainer.max_steps=1")
    evaluate = functools.partial(run_evaluate, str(tmp_path / "run/seed-0/adapter"), None, "sst2")
    found = [
        evaluate(str(place / "labels.tsv"), EvaluationOptions(max_length=length), tmp_path / f"{length}", rows=6)
        for length in (4, None)
    ]
    assert result.tests["sst2"] == pytest.approx(found[0].metrics)
    assert found[0].metrics["loss"] != pytest.approx(found[1].metrics["loss"])
    with pytest.raises(ValueError, match="max_length=41: the model reads at most 40 tokens"):  # before it is trained
        train(place, "labels", tmp_path / "other", "data.max_length=41")
    assert not (tmp_path / "other").exists()


@long
@pytest.mark.parametrize(
    ("name", "auto"), [("sft", AutoModelForCausalLM), ("labels", AutoModelForSequenceClassification)]
)
def test_all_weights_can_be_trained(name, auto, place, tmp_path):
    more = ["data.test=null"] if name == "sft" else []
    (result,) = train(place, name, tmp_path / "run", "adapter=null", *more)
    assert result.trained_parameters == result.all_parameters
    assert auto.from_pretrained(tmp_path / "run" / "seed-0" / "model").num_parameters() == result.all_parameters


@long
def test_a_head_of_another_task_is_refused_with_the_remedy(place, tmp_path):
    shutil.copytree(place / "bert", tmp_path / "bert")
    tiny_bert(num_labels=5).save_pretrained(tmp_path / "bert")
    more = [f"model={tmp_path / 'bert'}", "trainer.max_steps=1"]
    with pytest.raises(ValueError, match="ignore_mismatched_sizes: true"):
        train(place, "labels", tmp_path / "run", *more)
    train(place, "labels", tmp_path / "run2", *more, "model_arguments.ignore_mismatched_sizes=true")


@long
@pytest.mark.parametrize(
    "more",
    [
        ["quantize.rounds=2"],
        ["quantize.residual=false", "adapter.method=lora"],
        ["quantize.residual=true", "adapter={method: lora, r: 4, init_lora_weights: pissa}"],
    ],
)
def test_an_adapter_of_a_quantised_base_finds_it(more, place, tmp_path):
    pytest.importorskip("bitsandbytes")
    (result,) = train(place, "sft", tmp_path / "run", "trainer.max_steps=2", *more)
    saved = load_file(tmp_path / "run" / "seed-0" / "adapter" / "adapter_model.safetensors")
    dtypes = {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()}
    assert dtypes == {torch.float32}  # TRL would have made them bfloat16
    adapter, data = tmp_path / "run" / "seed-0" / "adapter", place / "rows.jsonl"
    found = run_evaluate(str(adapter), None, "instructions", str(data), EvaluationOptions(), tmp_path / "found", rows=6)
    assert found.metrics["loss"] == pytest.approx(result.tests["instructions"]["loss"], abs=1e-5)


def test_a_weight_in_4_bits_has_as_many_parameters(place, tmp_path):
    pytest.importorskip("bitsandbytes")
    more = ("adapter.method=lora", "trainer.max_steps=1", "data.test=null")
    (whole,) = train(place, "sft", tmp_path / "whole", *more)
    (in_4_bits,) = train(place, "sft", tmp_path / "in-4-bits", *more, "quantize.residual=false")
    assert in_4_bits.trained_parameters == whole.trained_parameters
    assert in_4_bits.all_parameters == whole.all_parameters


@long
def test_a_run_killed_after_its_last_step_does_no_further_one(place, tmp_path):
    (whole,) = train(place, "sft", tmp_path / "run", "trainer.max_steps=5", "trainer.eval_steps=5")
    seed = tmp_path / "run" / "seed-0"
    (seed / "results.json").unlink()
    shutil.rmtree(seed / "adapter")
    (tmp_path / "run").rename(tmp_path / "moved")
    (resumed,) = train(place, "sft", tmp_path / "moved", "trainer.max_steps=5", "trainer.eval_steps=5", resume=True)
    assert (resumed.curve("loss"), resumed.curve("eval_loss")) == (whole.curve("loss"), whole.curve("eval_loss"))
    assert (resumed.steps, resumed.best_step, resumed.tests) == (whole.steps, whole.best_step, whole.tests)
    assert resumed.validation["loss"] == whole.validation["loss"]
    assert (tmp_path / "moved" / "seed-0" / "adapter" / "adapter_model.safetensors").is_file()


@long
def test_pairs_that_trl_drops_are_told(place, tmp_path, capsys):
    rows = (place / "pairs.jsonl").read_text(encoding="utf-8")
    long = {"prompt": " ".join(WORDS[:20]) + " ", "chosen": WORDS[20], "rejected": WORDS[21]}
    (tmp_path / "pairs.jsonl").write_text(rows + 3 * (json.dumps(long) + "\n"), encoding="utf-8")
    data = [f"data.train={tmp_path / 'pairs.jsonl'}", f"data.validation={place / 'pairs.jsonl'}", "data.test=null"]
    train(place, "dpo", tmp_path / "run", *data, "trainer.max_length=12", "trainer.max_steps=1")
    assert "3 of 43 rows of train_dataset left out" in capsys.readouterr().out


@long
def test_rows_whose_prompts_fill_the_length_are_left_out_and_said(place, tmp_path, capsys):
    more = ["trainer.max_steps=1", "data.test=null"]
    long = {"prompt": " ".join(WORDS[:20]) + " ", "response": WORDS[20]}
    rows = (place / "rows.jsonl").read_text(encoding="utf-8") + 3 * (json.dumps(long) + "\n")
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    data = [f"data.train={tmp_path / 'rows.jsonl'}", f"data.validation={place / 'rows.jsonl'}"]
    train(place, "sft", tmp_path / "run", *data, "trainer.max_length=12", *more)
    assert "3 of 43 rows of train_dataset left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of the 40 rows of train_dataset"):
        train(
            place,
            "sft",
            tmp_path / "other",
            "data.validation=1",
            f"data.train={place / 'rows.jsonl'}",
            f"data.validation={place / 'rows.jsonl'}",
            "trainer.max_length=4",
            *more,
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.learning_rat=1"], "Did you mean learning_rate?"),
        (["adapter.method=dotta"], "Did you mean dota?"),
        (["task=instruction"], "Did you mean instructions?"),
        (["data.train=nowhere.jsonl"], "no file nowhere.jsonl"),
        (["data.validation=40"], "expected at least 41 rows, got 40"),
        (["evaluate.beams=3"], "evaluate: unknown key 'beams'"),
        (["adapter.target_modules=[nothing]"], "nothing"),
        (["adapter.num_core=3"], "Did you mean num_cores?"),
        (["evaluate.mode=likelihood"], "expected choices"),
        (["data.max_length=8"], "trainer.max_length"),
        (["head_learning_rate=1e-3"], "gets no new head"),
        (["adapter=null", "quantize={residual: false}", "data.test=null"], "weights in 4 bits are not trained"),
        (["head={target_modules: [lm_head]}"], "gives labels"),
        (["task=stsb", "max_step_kl=0.01"], "max_step_kl: a model for the task stsb tells no probabilities"),
        (["task=folding", "max_step_kl=0.01"], "max_step_kl: a model for the task folding tells no probabilities"),
        (["model_arguments.atn_implementation=eager"], "atn_implementation"),
        (["model_arguments.dtype=bf16"], "model_arguments.dtype='bf16': expected auto, float32, bfloat16 or float16"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(overrides, message, place, tmp_path, capsys):
    command = ["train", str(place / "sft.yaml"), f"output={tmp_path / 'run'}", *overrides]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tensorpeft: ")
    assert message in error
    assert not list(tmp_path.glob("run/recipe.yaml"))  # the corrected command may use the folder


def test_a_run_goes_on_with_the_rows_that_it_has_read(place, tmp_path, monkeypatch):
    rows, more = tmp_path / "mine.jsonl", ("data.test=null", "trainer.max_steps=1")
    shutil.copy(place / "rows.jsonl", rows)
    train(place, "sft", tmp_path / "run", f"data.train={rows}", *more)
    monkeypatch.setattr("tensorpeft.training.seed.find_versions", lambda: {"torch": "another"})
    resume = functools.partial(train, place, "sft", tmp_path / "run", f"data.train={rows}", *more, resume=True)
    resume("seeds=[0,1]")
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert f"torch {torch.__version__.partition('+')[0]}" in report.partition("Versions differ: ")[2]
    assert "another (seed 1)" in report
    rows.write_text("\n".join(reversed(rows.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"data.train \(.*mine.jsonl\): the rows of train are others .* Put the data back"
    ):
        resume()
    # What is older than the record of its rows and versions is taken up as it is.
    (tmp_path / "run" / "rows.json").unlink()
    results = tmp_path / "run" / "seed-0" / "results.json"
    tree = json.loads(results.read_text(encoding="utf-8"))
    results.write_text(json.dumps({key: value for key, value in tree.items() if key != "versions"}), encoding="utf-8")
    assert resume()[0].versions == {}
