import json
from io import StringIO

import pytest

from evaluation.evaluated import LLAMA, adapt, sentence, word_tokenizer
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.evaluation.harness import run_lm_eval, table_rows
from tensorpeft.evaluation.run import run_lm_eval_command
from tensorpeft.tasks.task import Question, QuestionTask

pytest.importorskip("lm_eval")
ROWS = [
    {"question": sentence(k, 3 + k % 4), "choices": [sentence(20 + k, 1), sentence(40 + k, 3)], "gold": k % 2}
    for k in range(6)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of one's own."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    task = f"""
        task: tiny_choices
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {folder / "rows.jsonl"}}}}}
        test_split: test
        output_type: multiple_choice
        doc_to_text: "{{{{question}}}}"
        doc_to_choice: choices
        doc_to_target: gold
        metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
    """
    lines = [line[8:] for line in task.strip("\n").split("\n")]
    (folder / "tiny_choices.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_tasks_only():
    """Without the thousands that come with lm-eval, whose files take seconds to read."""
    from lm_eval.tasks import TaskManager

    patch = pytest.MonkeyPatch()
    make = TaskManager.__init__
    patch.setattr(TaskManager, "__init__", lambda self, **more: make(self, include_defaults=False, **more))
    yield
    patch.undo()


@pytest.mark.parametrize("method", ["dota", "lorta"])
def test_lm_eval_sees_the_adapter_and_agrees_with_our_likelihoods(method, tasks):
    adapted, tokenizer = adapt(LLAMA, method), word_tokenizer()
    found = run_lm_eval(adapted, tokenizer, ["tiny_choices"], batch_size=4, include_path=tasks)
    task = QuestionTask("choices", "", read=None, parse=None)
    questions = [
        Question(row["question"], "", choices=tuple(f" {c}" for c in row["choices"]), gold=row["gold"]) for row in ROWS
    ]
    ours = evaluate_task(adapted, tokenizer, task, questions, EvaluationOptions("likelihood"))
    for row, sample in zip(ours.rows, found["samples"]["tiny_choices"], strict=True):
        theirs = [log_prob for log_prob, _ in sample["filtered_resps"]]
        assert row["log_probs"] == pytest.approx(theirs, abs=1e-4)
    results = found["results"]["tiny_choices"]
    assert results["acc,none"] == pytest.approx(ours.metrics["accuracy"])
    assert results["acc_norm,none"] == pytest.approx(ours.metrics["accuracy, by length"])
    base = run_lm_eval(LLAMA.fresh(), tokenizer, ["tiny_choices"], batch_size=4, include_path=tasks)
    samples = [found["samples"]["tiny_choices"][0], base["samples"]["tiny_choices"][0]]
    assert samples[0]["filtered_resps"] != samples[1]["filtered_resps"]


def test_an_unknown_task_is_refused(tasks):
    with pytest.raises(ValueError, match="lm-eval has no task 'tiny_choice'"):
        run_lm_eval(LLAMA.fresh(), word_tokenizer(), ["tiny_choice"], batch_size=4, include_path=tasks)


def test_the_command_writes_results_and_rows(tasks, tmp_path):
    base, terminal = tmp_path / "base", StringIO()
    LLAMA.fresh().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    adapted = adapt(LLAMA)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    found = run_lm_eval_command(
        str(tmp_path / "adapter"),
        None,
        ["tiny_choices"],
        tmp_path / "out",
        limit=4,
        include_path=tasks,
        terminal=terminal,
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["results"]["tiny_choices"]["acc,none"] == found["results"]["tiny_choices"]["acc,none"]
    assert (results["model"], results["adapter"]) == (str(base), str(tmp_path / "adapter"))
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["doc"]["question"] for line in lines] == [row["question"] for row in ROWS[:4]]
    shown = terminal.getvalue()
    assert "tiny_choices" in shown
    assert f"{found['results']['tiny_choices']['acc,none']:.4f}" in shown
    assert max(len(line) for line in shown.splitlines()[:-1]) <= 80


def test_the_table_has_metrics_with_their_errors():
    results = {
        "one": {"alias": " - one", "acc,none": 0.5, "acc_stderr,none": 0.25, "sample_len": 4},
        "two": {"exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A"},
    }
    assert table_rows({"results": results}) == [
        [" - one", "acc", "0.5000", "0.2500"],
        ["two", "exact_match, strict", "1.0000", ""],
    ]
