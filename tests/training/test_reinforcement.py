"""`tensorpeft train` with rewards: TRL's GRPO, whose validation loss is minus the reward."""

import json

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from transformers import Trainer

from tensorpeft.studies.compare.entries import load_entries
from tensorpeft.studies.compare.run import run_compare
from tensorpeft.tasks.records import Record
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.results import read_result
from tensorpeft.training.rewards import find_rewards
from tensorpeft.training.run import run_training

TRAINER = {
    "max_steps": 8,
    "eval_steps": 4,
    "logging_steps": 1,
    "eval_on_start": True,
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "num_generations_eval": 4,
    "max_completion_length": 4,
    "learning_rate": 0.1,
    "bf16": False,
    "gradient_checkpointing": False,
}
# A row as published, a right text, a wrong one of the right form, and one without an answer.
JUDGED = {
    "gsm8k": ({"question": "2 + 2?", "answer": "It is 4.\n#### 4"}, "The answer is: 4", "It is 5.", "None."),
    "math": ({"problem": "2 + 2?", "solution": r"\boxed{4}"}, r"So \boxed{4}.", r"\boxed{5}", "It is 4."),
    "boolq": ({"question": "is water wet", "answer": True}, "true", "false, they say", "Yes."),
    "signatures": ({"signature": "def f(a)", "answer": '{"required": ["a"]}'}, '{"required":["a"]}', "{}", "{"),
}


def share_of_small_words(completions, answers, **more):
    """A reward: how many of the words are among the first half of the tokenizer's."""
    assert len(answers) == len(completions)
    words = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(word < 50 for word in found) / max(len(found), 1) for found in words]


def one_too_few(completions, **more):
    return [0.0] * (len(completions) - 1)


def not_a_number(completions, **more):
    return [float("nan")] * len(completions)


def that_fails(**more):
    raise KeyError("no such column")


@pytest.fixture(scope="module")
def recipe(place, tmp_path_factory):
    """A recipe's file in which the tiny Llama is rewarded for small words."""
    tree = {
        "model": str(place / "llama"),
        "task": "instructions",
        "adapter": {"method": "lorta", "r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "data": {"train": str(place / "rows.jsonl"), "validation": 4},
        "rewards": {f"{__name__}:share_of_small_words": 2},
        "trainer": TRAINER,
        "output": "never",
    }
    file = tmp_path_factory.mktemp("rewarded") / "recipe.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


def train(recipe, output, *overrides, resume=False):
    return run_training(load_recipe(recipe, [*overrides, f"output={output}"]), resume)[0]


@pytest.fixture(scope="module")
def whole(recipe):
    return train(recipe, recipe.parent / "whole")


def test_a_model_learns_what_is_rewarded(recipe, tmp_path):
    result = train(recipe, tmp_path / "run", "trainer.max_steps=24", "trainer.eval_steps=24")
    (before, first), (after, last) = result.curve("eval_reward")
    assert (before, after) == (0, 24)
    assert last > first + 0.2
    assert result.curve("eval_loss") == [(0, -first), (24, -last)]
    assert result.validation["loss"] == -last
    rewards = [reward for _, reward in result.curve("reward")]
    assert sum(rewards[-6:]) > sum(rewards[:6])
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert f"- Reward: 2 × {__name__}:share_of_small_words, of answers that are drawn." in report
    assert f"| validation reward before training | {first:.4f} |" in report
    assert f"| validation reward | {last:.4f} |" in report
    assert "clip_ratio" not in report.partition("## Recipe")[0]


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(recipe, whole, tmp_path, monkeypatch):
    steps, step = [], Trainer.training_step

    def interrupted(self, *arguments, **more):
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return step(self, *arguments, **more)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    resumed = train(recipe, tmp_path / "run", resume=True)
    assert len(steps) == 7 + 4  # the checkpoint is of step 4
    assert dict(resumed.curve("reward")) == pytest.approx(dict(whole.curve("reward")), abs=1e-5)
    assert dict(resumed.curve("loss")) == pytest.approx(dict(whole.curve("loss")), abs=1e-5)
    assert resumed.validation == pytest.approx(whole.validation, abs=1e-5)


def test_the_best_checkpoint_is_the_one_of_the_highest_reward(whole):
    saved = {step: reward for step, reward in whole.curve("eval_reward") if step > 0}
    assert saved[whole.best_step] == max(saved.values())
    assert -whole.validation["loss"] == pytest.approx(saved[whole.best_step])  # the same draws, again


def test_the_validation_loss_is_minus_the_mean_over_all_rows(recipe, tmp_path, monkeypatch):
    """The last batch is smaller, and its rewards weigh no more than others."""
    rewards = iter(range(24))
    monkeypatch.setattr(f"{__name__}.share_of_small_words", lambda **of: [float(next(rewards)) for _ in of["answers"]])
    more = ["trainer.max_steps=1", "trainer.eval_strategy=no", "trainer.eval_on_start=false", "data.validation=3"]
    result = train(recipe, tmp_path / "run", *more, "trainer.per_device_eval_batch_size=8")
    judged = range(8, 8 + 12)  # after the step's: three rows, four answers each
    assert result.validation["loss"] == pytest.approx(-2 * sum(judged) / len(judged))
    assert result.validation["reward"] == -result.validation["loss"]


@pytest.mark.parametrize("name", JUDGED)
def test_answer_and_format_are_what_the_task_judges(name):
    task, (row, right, wrong, none) = find_task(name), JUDGED[name]
    (question,) = task.parse(Record(row, "row 1"))
    columns = {"response": question.response, "answers": list(question.answers), "choices": list(question.choices)}
    columns |= {"gold": question.gold, "key": question.key}
    repeated = {key: [value] * 3 for key, value in columns.items()}
    answer, form = find_rewards(["answer", "format"], task)
    given = {"prompts": [question.prompt] * 3, "completions": [right, wrong, none], "completion_ids": [[1]] * 3}
    assert answer(**given, **repeated, trainer_state=None) == [1, 0, 0]
    assert form(**given, **repeated, trainer_state=None) == [1, 1, 0]
    assert (answer.__name__, form.__name__) == ("answer", "format")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("rewards={nswer: 1}", "no reward 'nswer'. Known are answer, format, and MODULE:FUNCTION"),
        ("rewards={answer: 1}", "the task instructions has no right answers"),
        ("rewards={answer: high}", "expected a number by name"),
        ("rewards={answer: .nan}", "expected a number by name"),
        ("rewards={}", "expected a number by name"),
        ("rewards={no_such_module:function: 1}", "PYTHONPATH=FOLDER"),
        ("rewards={json:nothing: 1}", "has no attribute 'nothing'"),
        ("rewards={string:digits: 1}", "it is str, expected a function"),
        ("rewards={os:getcwd: 1}", r"rewards.os:getcwd: TypeError"),
        (f"rewards={{{__name__}:one_too_few: 1}}", "expected 8 finite numbers, one per completion"),
        (f"rewards={{{__name__}:not_a_number: 1}}", "expected 8 finite numbers, one per completion"),
        (f"rewards={{{__name__}:that_fails: 1}}", "that_fails: KeyError: 'no such column'"),
        ("task=preferences", "only answers to questions are rewarded"),
        ("data.loss_on=text", "with rewards no text is shown"),
        ("trainer.reward_weights=[1]", "a recipe says this with rewards"),
        ("trainer.num_generations=3", r"generation_batch_size \(8\) must be divisible by num_generations \(3\)"),
        ("trainer.num_generation=4", "Did you mean num_generations"),
        ("trainer.packing=true", "unknown key 'packing'"),
    ],
)
def test_a_wrong_reward_is_named(recipe, overrides, expected, tmp_path):
    replaced = [f"rewards={{{__name__}:share_of_small_words: null}}"] if overrides.startswith("rewards") else []
    with pytest.raises(ValueError, match=expected):
        train(recipe, tmp_path / "run", *replaced, "trainer.eval_on_start=false", overrides)


def test_a_question_without_a_prompt_is_refused(recipe, tmp_path):
    (tmp_path / "texts.txt").write_text("w5 w6 w7\n" * 40, encoding="utf-8")
    with pytest.raises(ValueError, match="has no prompt to answer"):
        train(recipe, tmp_path / "run", "task=lines", f"data.train={tmp_path / 'texts.txt'}")


def test_rates_are_compared_by_their_rewards(recipe, tmp_path):
    tree = json.loads(recipe.read_text(encoding="utf-8"))
    methods = {"lorta": {"rates": [1e-6, 0.1]}, "lora": {"rates": [1e-6]}}
    tree["compare"] = {"seeds": 1, "widenings": 0, "methods": methods, "output": str(tmp_path / "compared")}
    (tmp_path / "compared.yaml").write_text(json.dumps(tree), encoding="utf-8")
    comparison = load_entries(tmp_path / "compared.yaml", overrides=["trainer.max_steps=16", "trainer.eval_steps=16"])
    lorta, _ = run_compare(comparison, timing_rounds=1)
    assert not lorta.has_failed, lorta.problem
    assert lorta.rate == 0.1
    assert lorta.final[0].loss == -max(-run.loss for run in lorta.search)
    assert lorta.costs.step_seconds > 0
    assert read_result(next((tmp_path / "compared").rglob("lora/*/seed-0/results.json"))).validation["reward"] >= 0
