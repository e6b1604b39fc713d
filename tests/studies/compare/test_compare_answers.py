"""Answers of several models to the same questions, read from what their tests wrote."""

import json

import pytest

pytest.importorskip("omegaconf")
from tensorpeft.studies.compare.answers import answer_lines, answer_table, read_answers


def write(path, answers, **more):
    rows = [
        {
            "prompt": f"Name\na {k}",
            "gold": [f"gold {k}"],
            "generated": text,
            "metrics": {"exact": score, "f1": 0.5},
            **more,
        }
        for k, (text, score) in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def predictions(tmp_path):
    before = write(tmp_path / "before.jsonl", [("I am\n happy to help " + "x" * 400, 0.0), ("no", 0.0), ("no", 0.0)])
    after = write(tmp_path / "after.jsonl", [("gold 0", 1.0), ("gold", 0.25), ("gold 2", 1.0)])
    return [("before training", before), ("LoRA", after), ("failed", tmp_path / "none.jsonl")]


def test_the_first_questions_have_the_answers_of_all_models_that_were_tested(predictions):
    first, second = read_answers(predictions, 2)
    assert (first.prompt, first.expected) == ("Name a 0", "gold 0")
    assert [(answer.label, answer.mark) for answer in first.answers] == [("before training", "✗"), ("LoRA", "✓")]
    assert first.answers[0].text.startswith("I am happy to help x")
    assert len(first.answers[0].text) == 160
    assert second.answers[1].mark == "0.25"


def test_a_row_per_question_and_a_column_per_model(predictions):
    _, headers, rows, _ = answer_table(read_answers(predictions, 9))
    assert headers == ["question", "expected", "before training", "LoRA"]
    assert rows[2] == ["Name a 2", "gold 2", "✗ no", "✓ gold 2"]


def test_lines_fit_the_terminal(predictions):
    lines = answer_lines(read_answers(predictions, 3), 60)
    assert max(map(len, lines)) == 60
    assert "  ✓ LoRA             gold 2" in lines
    assert "    expected         gold 2" in lines


def test_of_a_long_question_the_end_is_shown(tmp_path):
    row = {"prompt": f"{'Read this. ' * 9}What is it?", "gold": ["a"], "generated": "b", "metrics": {"exact": 0.0}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    question = answer_lines(read_answers([("LoRA", tmp_path / "rows.jsonl")], 1), 40)[1]
    assert len(question) == 40
    assert question.startswith("…")
    assert question.endswith("What is it?")


def test_where_nothing_was_generated_there_are_no_answers(tmp_path):
    path = tmp_path / "loss.jsonl"
    path.write_text(json.dumps({"key": "a", "loss": 1.0}) + "\n", encoding="utf-8")
    assert read_answers([("LoRA", path)], 3) == []
    assert answer_lines([], 80) == []
