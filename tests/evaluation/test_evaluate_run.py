import json
import sys
from io import StringIO
from types import ModuleType

import pytest
import torch
from peft import get_peft_model

from cases import Model, perturb
from evaluation.evaluated import CONFIGS, LLAMA, adapt, sentence, tiny_bert, word_tokenizer
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.evaluation.report import metrics_table
from tensorpeft.evaluation.run import run_evaluate
from tensorpeft.loading.adapters import load_model
from tensorpeft.tasks.records import read_json_lines
from tensorpeft.tasks.task import Generation, LabelledText, LabelTask, Question, QuestionTask, Scored, StructureTask

BERT = Model("bert", lambda: tiny_bert(2), ["query", "value"], "SEQ_CLS")


def parse_question(record):
    return (Question(record.text("prompt"), record.text("response"), key=record.place),)


def parse_text(record):
    return (LabelledText((record.text("prompt"),), int(record.number("label"))),)


def score(text, question):
    assert question.prompt not in text
    return Scored(text[:2], {"words": len(text.split()) / 10})


def failing_score(text, question):
    raise RuntimeError("no score")


def accuracy(labels, predictions):
    return sum(a == b for a, b in zip(labels, predictions, strict=True)) / len(labels)


GENERATION = Generation(max_new_tokens=4)
TASKS = {
    "words": QuestionTask("words", "", read_json_lines, parse_question, GENERATION, score),
    "failing": QuestionTask("failing", "", read_json_lines, parse_question, GENERATION, failing_score),
    "kinds": LabelTask("kinds", "", read_json_lines, parse_text, {"accuracy": accuracy}, ("no", "yes")),
    "folding": StructureTask("folding", "", load=lambda path: [None]),
}


@pytest.fixture(autouse=True)
def tiny_registry(monkeypatch):
    registry = ModuleType("tensorpeft.tasks.registry")
    registry.find_task = TASKS.__getitem__
    monkeypatch.setitem(sys.modules, "tensorpeft.tasks.registry", registry)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an adapter that names it, a classifier's adapter on a base without a head, and rows."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = word_tokenizer()
    LLAMA.fresh().save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    adapted = adapt(LLAMA)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "llama")
    adapted.save_pretrained(folder / "llama-dota")
    BERT.fresh().bert.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    classifier = get_peft_model(BERT.fresh(), CONFIGS["dota"](target_modules=BERT.targets, task_type="SEQ_CLS"))
    perturb(classifier, scale=1.0)
    classifier.save_pretrained(folder / "bert-dota")
    headless = get_peft_model(BERT.fresh(), CONFIGS["dota"](target_modules=BERT.targets))
    headless.save_pretrained(folder / "headless")
    rows = [{"prompt": sentence(k, 2 + k), "response": " w4", "label": k % 2} for k in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run(folder, output, model="llama-dota", adapter=None, task="words", **more):
    adapter = None if adapter is None else folder / adapter
    options = more.pop("options", EvaluationOptions(batch_size=4))
    return run_evaluate(
        str(folder / model), adapter, task, folder / "rows.jsonl", options, output, terminal=StringIO(), **more
    )


def test_an_adapter_is_evaluated_on_the_base_that_it_names(folder, tmp_path):
    found = run(folder, tmp_path / "out")
    rows = [Question(sentence(k, 2 + k), " w4") for k in range(6)]
    expected = evaluate_task(adapt(LLAMA), word_tokenizer(), TASKS["words"], rows)
    assert [row["generated"] for row in found.rows] == [row["generated"] for row in expected.rows]
    assert found.metrics == expected.metrics
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == found.rows
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["metrics"] == found.metrics
    assert results["options"] == {
        "mode": None,
        "batch_size": 4,
        "max_new_tokens": None,
        "num_beams": None,
        "max_length": None,
        "beta": 0.1,
        "chat": False,
    }
    assert results["data"] == str(folder / "rows.jsonl")
    assert results["model"] == str(folder / "llama")
    assert results["adapter"] == str(folder / "llama-dota")
    assert (results["task"], results["mode"], results["num_rows"]) == ("words", "generate", 6)
    assert results["dtype"] == "float32"
    assert results["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__


def test_base_and_adapter_may_be_named_apart(folder, tmp_path):
    both = run(folder, tmp_path, model="llama", adapter="llama-dota", rows=3)
    assert both.rows == run(folder, tmp_path).rows[:3]
    assert both.rows != run(folder, tmp_path, model="llama").rows[:3]


def test_the_table_is_printed_within_80_columns(folder, tmp_path):
    terminal = StringIO()
    options = EvaluationOptions(batch_size=4, max_length=3)
    run_evaluate(str(folder / "llama"), None, "words", str(folder / "rows.jsonl"), options, tmp_path, terminal=terminal)
    shown = terminal.getvalue()
    assert "words: generate, 6 rows" in shown
    assert "0.4000" in shown
    assert "4 of 6 rows were cut (max_length)." in shown
    assert str(tmp_path) in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80


def test_a_classifier_takes_its_head_from_the_adapter(folder, tmp_path):
    found = run(folder, tmp_path, "bert", "bert-dota", "kinds")
    model = get_peft_model(BERT.fresh(), CONFIGS["dota"](target_modules=BERT.targets, task_type="SEQ_CLS"))
    perturb(model, scale=1.0)
    rows = [LabelledText((sentence(k, 2 + k),), k % 2) for k in range(6)]
    expected = evaluate_task(model, word_tokenizer(), TASKS["kinds"], rows)
    assert [row["loss"] for row in found.rows] == pytest.approx([row["loss"] for row in expected.rows], abs=1e-5)


@pytest.mark.parametrize("adapter", [None, "headless"])
def test_a_head_that_nobody_trained_is_refused(folder, tmp_path, adapter):
    with pytest.raises(ValueError, match=r"no trained weights .*classifier.weight.* Pass a model, or an adapter"):
        run(folder, tmp_path, "bert", adapter, "kinds")


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="llama-dota is a saved adapter itself"):
        run(folder, tmp_path, "llama-dota", "llama-dota")
    with pytest.raises(ValueError, match="rows=0: expected at least 1"):
        run(folder, tmp_path, rows=0)
    with pytest.raises(ValueError, match="dtype='int8': expected bfloat16, float16, float32"):
        run(folder, tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="only questions have modes"):
        run(folder, tmp_path, "bert", "bert-dota", "kinds", options=EvaluationOptions("loss"))
    with pytest.raises(ValueError, match="a model that folds proteins cannot be loaded from a folder yet"):
        run(folder, tmp_path, task="folding")
    assert not list(tmp_path.iterdir())


def test_the_dtype_is_the_one_asked_for(folder):
    model, _ = load_model(str(folder / "llama"), None, None, "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_run_that_fails_leaves_the_files_of_the_last_one(folder, tmp_path):
    run(folder, tmp_path, rows=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="no score"):
        run(folder, tmp_path, task="failing")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_table_says_what_was_left_out():
    from tensorpeft.evaluation import Evaluation

    rows = [{"cut": True, "left_out": True}, {"cut": True}, {}]
    table = metrics_table(Evaluation("texts", "loss", 3, {"loss": 1.5, "perplexity": 123456789.0}, rows))
    assert table.title == "texts: loss, 3 rows"
    assert table.notes == ["2 of 3 rows were cut (max_length).", "1 of them: no response left, and in no metric."]
    assert [row[1] for row in table.rows] == ["1.5000", "1.235e+08"]
