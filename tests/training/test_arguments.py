import dataclasses

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("trl")
import torch
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, SFTConfig

from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.task import StructureTask
from tensorpeft.training.adapters import make_config
from tensorpeft.training.arguments import make_arguments

FOLDING = StructureTask("chains", "Chains.", load=lambda path: [])
TASKS = [
    (find_task("rte"), None, TrainingArguments),
    (FOLDING, None, TrainingArguments),
    (find_task("squad"), None, SFTConfig),
    (find_task("stories"), None, SFTConfig),
    (find_task("preferences"), None, DPOConfig),
    (find_task("gsm8k"), {"answer": 1, "format": 0.5}, GRPOConfig),
]
OURS = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 0.1,
    "save_steps": 0.1,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,  # follows from the metric
    "do_eval": True,  # follows from the strategy
    "logging_steps": 0.025,
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "ddp_timeout": 7 * 24 * 3600,
    "use_cpu": not torch.accelerator.is_available(),
    "seed": 7,
    "data_seed": 7,
}


def make(folder, task="rte", **trainer):
    return make_arguments(trainer, find_task(task), folder, seed=7)


def checkpoints(arguments):
    """When the validation loss is taken, when a checkpoint is written, and which one is loaded at the end."""
    names = ("eval_strategy", "save_strategy", "load_best_model_at_end", "metric_for_best_model")
    return tuple(getattr(value := getattr(arguments, name), "value", value) for name in names)


@pytest.mark.parametrize(("task", "rewards", "expected"), TASKS, ids=lambda part: getattr(part, "name", ""))
def test_all_that_we_do_not_say_is_the_libraries_default(tmp_path, task, rewards, expected):
    plain = expected(output_dir=str(tmp_path), use_cpu=OURS["use_cpu"])
    ours = make_arguments({}, task, tmp_path, 7, rewards)
    assert type(ours) is expected
    found = {field.name: getattr(ours, field.name) for field in dataclasses.fields(expected)}
    wanted = OURS | ({} if rewards is None else {"reward_weights": list(rewards.values())})
    assert found == {field.name: getattr(plain, field.name) for field in dataclasses.fields(expected)} | wanted


def test_what_is_given_is_kept(tmp_path):
    given = {"learning_rate": 5e-3, "logging_steps": 3, "save_total_limit": 4, "dataloader_pin_memory": False}
    given |= {"disable_tqdm": False, "lr_scheduler_type": "cosine", "eval_steps": 10, "report_to": ["none"]}
    found = make(tmp_path, **given)
    assert {name: getattr(found, name) for name in given} == given | {"report_to": []}
    assert (make(tmp_path, "squad", max_length=99).max_length, make(tmp_path, "preferences", beta=0.3).beta) == (
        99,
        0.3,
    )


def test_the_recipe_is_left_as_it_was(tmp_path):
    trainer = {"eval_strategy": False}
    make_arguments(trainer, FOLDING, tmp_path, seed=0)
    assert trainer == {"eval_strategy": False}


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, ("steps", "steps", True, "eval_loss")),
        ({"eval_strategy": "epoch"}, ("epoch", "epoch", True, "eval_loss")),
        ({"save_strategy": "epoch"}, ("epoch", "epoch", True, "eval_loss")),
        ({"save_strategy": "best"}, ("steps", "best", True, "eval_loss")),
        ({"eval_strategy": "epoch", "save_strategy": "best"}, ("epoch", "best", True, "eval_loss")),
        ({"metric_for_best_model": "eval_accuracy"}, ("steps", "steps", True, "eval_accuracy")),
        # YAML reads an unquoted no as False.
        ({"eval_strategy": False}, ("no", "no", False, None)),
        ({"eval_strategy": "no"}, ("no", "no", False, None)),
        ({"eval_strategy": False, "save_strategy": "steps"}, ("no", "steps", False, None)),
        ({"save_strategy": False}, ("steps", "no", False, None)),
        # The libraries cannot find the best of checkpoints that were written at other times than they were scored.
        ({"save_strategy": "epoch", "eval_steps": 5}, ("steps", "epoch", False, None)),
        ({"load_best_model_at_end": False}, ("steps", "steps", False, None)),
        ({"load_best_model_at_end": False, "save_strategy": "best"}, ("steps", "best", False, "eval_loss")),
    ],
)
def test_the_best_checkpoint_is_loaded_wherever_there_is_one(tmp_path, trainer, expected):
    assert checkpoints(make(tmp_path, **trainer)) == expected


def test_a_larger_metric_is_better_a_larger_loss_is_not(tmp_path):
    assert make(tmp_path, metric_for_best_model="eval_accuracy").greater_is_better is True
    assert make(tmp_path, metric_for_best_model="eval_loss").greater_is_better is False


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"eval_steps": 20}, (20, 20)),
        ({"save_steps": 20}, (20, 20)),
        ({"eval_steps": 0.5}, (0.5, 0.5)),
        ({"eval_steps": 20, "save_steps": 40}, (20, 40)),
        ({"eval_strategy": False, "save_strategy": "steps", "save_steps": 20}, (None, 20)),
        ({"eval_strategy": False, "save_strategy": "steps"}, (None, 0.1)),
    ],
)
def test_steps_of_evaluation_and_checkpoints_fit(tmp_path, trainer, steps):
    found = make(tmp_path, **trainer)
    assert (found.eval_steps, found.save_steps) == steps


def test_no_other_strategy_hides_a_false(tmp_path):
    assert make(tmp_path, logging_strategy=False).logging_strategy == "no"
    assert make(tmp_path, bf16=False).bf16 is False


@pytest.mark.parametrize(
    ("name", "instead"),
    [("seed", "seeds"), ("data_seed", "seeds"), ("output_dir", "output"), ("resume_from_checkpoint", "--resume")],
)
def test_what_a_recipe_says_elsewhere_is_refused(tmp_path, name, instead):
    with pytest.raises(ValueError, match=rf"^trainer\.{name}: a recipe says this with {instead}\. Remove it here"):
        make(tmp_path, **{name: "x"})


@pytest.mark.parametrize(
    ("task", "trainer", "message"),
    [
        ("rte", {"learning_rte": 1}, r"TrainingArguments\): unknown key 'learning_rte'\. Did you mean learning_rate\?"),
        ("rte", {"evaluation_strategy": "no"}, r"unknown key 'evaluation_strategy'\. Did you mean eval_strategy\?"),
        ("rte", {"max_length": 9}, r"TrainingArguments\): unknown key 'max_length'"),
        ("squad", {"max_lenght": 9}, r"SFTConfig\): unknown key 'max_lenght'\. Did you mean max_length\?"),
        ("squad", {"beta": 0.1}, r"SFTConfig\): unknown key 'beta'\. Known are accelerator_config"),
        ("preferences", {"packing": True}, r"DPOConfig\): unknown key 'packing'"),
        ("rte", {3: 4}, "unknown key 3"),
        ("rte", {"eval_strategy": "epochs"}, "epochs is not a valid"),
        ("rte", {"eval_strategy": True}, "True is not a valid"),
        ("rte", {"optim": "adamw_foo"}, "adamw_foo is not a valid"),
        ("rte", {"eval_steps": 20, "save_steps": 30}, "30, which is not a round multiple of 20"),
        ("rte", {"learning_rate": "fast"}, "learning_rate='fast': expected a number"),
        ("rte", {"num_train_epochs": "3"}, "num_train_epochs='3': expected a number"),
        ("squad", {"packing": "false"}, "packing='false': expected true or false"),
        ("preferences", {"beta": "0,1"}, "beta='0,1': expected a number"),
        # Where the default is None, too: a text is true, and would train in bfloat16.
        *(("rte", {"bf16": text}, f"bf16='{text}': expected true or false") for text in ("no", "false", "off", "0")),
        ("squad", {"bf16": 0}, "bf16=0: expected true or false"),
        ("squad", {"gradient_checkpointing": "no"}, "gradient_checkpointing='no': expected true or false"),
        ("rte", {"use_cpu": "no"}, "use_cpu='no': expected true or false"),
        ("rte", {"max_grad_norm": True}, "max_grad_norm=True: expected a number"),
        ("rte", {"per_device_train_batch_size": 1.5}, "expected a whole number"),
        ("rte", {"save_total_limit": "1"}, "save_total_limit='1': expected a whole number, null"),
        ("rte", {"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs=3: expected a mapping, a text, null"),
        ("rte", {"max_steps": 0}, "max_steps=0: expected some steps of training"),
        ("rte", {"num_train_epochs": 0}, "num_train_epochs=0, max_steps=-1: expected some steps of training"),
    ],
)
def test_unknown_names_and_wrong_values(tmp_path, task, trainer, message):
    with pytest.raises(ValueError, match=rf"^trainer.*{message}"):
        make_arguments(trainer, find_task(task), tmp_path, seed=0)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"method": "dotta"}, r"adapter\.method: unknown key 'dotta'\. Did you mean dota\?"),
        ({"method": 3}, r"adapter\.method: unknown key '3'\. Known are"),
        ({"method": "dota", "num_core": 3}, r"adapter, method dota: unknown key 'num_core'\. Did you mean num_cores\?"),
        ({"method": "lora", "rank": 3}, "adapter, method lora: unknown key 'rank'"),
        ({"method": "prompt_tuning"}, "adapter, method prompt_tuning: num_virtual_tokens is missing"),
    ],
)
def test_a_wrong_adapter(adapter, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_config(adapter, "CAUSAL_LM")


def test_an_adapter():
    config = make_config({"method": "LoRA", "r": 3, "target_modules": ["q"]}, "SEQ_CLS")
    assert type(config) is LoraConfig
    assert (config.r, config.target_modules, config.task_type) == (3, {"q"}, "SEQ_CLS")
    assert make_config({"method": "dota"}, None).task_type is None


def test_null_is_a_value_where_the_library_gives_it_a_meaning(tmp_path):
    assert make(tmp_path, "squad").max_length == SFTConfig(output_dir=str(tmp_path), use_cpu=True).max_length
    assert make(tmp_path, "squad", max_length=None).max_length is None  # TRL: cut nothing
    assert make(tmp_path, warmup_steps=None).warmup_steps == TrainingArguments(output_dir=str(tmp_path)).warmup_steps


def test_true_is_left_to_the_library_where_it_declares_a_text(tmp_path):
    assert make_arguments({"fsdp": True}, find_task("rte"), tmp_path, seed=0).fsdp
