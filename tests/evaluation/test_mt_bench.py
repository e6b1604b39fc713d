"""Questions of several turns, answered for a judge that is elsewhere."""

import json

import pytest
import torch
from transformers import GenerationConfig

from evaluation.evaluated import LLAMA, adapt, word_tokenizer
from evaluation.test_evaluate_chat import chat_tokenizer
from tensorpeft.evaluation import mt_bench
from tensorpeft.evaluation.mt_bench import DialogueQuestion, answer_questions, read_questions
from tensorpeft.evaluation.run import run_mt_bench

GREEDY, DRAWN = "math", "writing"


@pytest.fixture
def conversation_of_words(monkeypatch):
    """Alpaca's template in words that a tiny tokenizer knows."""
    monkeypatch.setattr(mt_bench, "conversation_prompt", lambda messages: " ".join(text for _, text in messages))


def likeliest(model, tokenizer, text, number):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    settings = GenerationConfig(max_new_tokens=number, do_sample=False, eos_token_id=3, pad_token_id=0)
    return tokenizer.decode(
        model.generate(ids, generation_config=settings)[0, ids.shape[1] :], skip_special_tokens=True
    )


def test_a_later_turn_reads_the_earlier_ones_with_the_models_answers(conversation_of_words):
    model, tokenizer = adapt(LLAMA), word_tokenizer()
    questions = [
        DialogueQuestion(81, GREEDY, ("w9 w10", "w11")),
        DialogueQuestion(82, DRAWN, ("w12",)),
        DialogueQuestion(83, GREEDY, ("w20", "w21 w22")),
    ]
    told = []
    answers = answer_questions(model, tokenizer, questions, 2, max_new_tokens=4, on_turn=told.append)
    assert [len(turns) for turns in answers] == [2, 1, 2]
    assert sum(told) == 5
    for question, (first, second) in zip((questions[0], questions[2]), (answers[0], answers[2]), strict=True):
        assert first == likeliest(model, tokenizer, question.turns[0], 4)
        assert second == likeliest(model, tokenizer, f"{question.turns[0]} {first} {question.turns[1]}", 4)


def test_categories_of_writing_are_drawn_by_the_seed(conversation_of_words):
    model, tokenizer = adapt(LLAMA), word_tokenizer()
    questions = [DialogueQuestion(k, DRAWN, (f"w{10 + k}",)) for k in range(3)]
    drawn = [answer_questions(model, tokenizer, questions, 3, 12, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_chat_template_writes_the_conversation():
    model, tokenizer = adapt(LLAMA), chat_tokenizer(bos=False)
    ((first, second),) = answer_questions(
        model, tokenizer, [DialogueQuestion(1, GREEDY, ("w9", "w10"))], max_new_tokens=3, chat=True
    )
    turns = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": first}]
    text = tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": "w10"}], add_generation_prompt=True, tokenize=False
    )
    assert second == likeliest(model, tokenizer, text, 3)


def test_the_file_is_what_fastchats_judge_reads(tmp_path, conversation_of_words):
    LLAMA.fresh().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question_id": 81, "category": GREEDY, "turns": ["w9", "w10"], "reference": ["w1", "w2"]}]
    (tmp_path / "question.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    output = tmp_path / "llama-r4"
    answers = run_mt_bench(str(tmp_path / "model"), None, tmp_path / "question.jsonl", output, max_new_tokens=3)
    (row,) = map(json.loads, (output / "llama-r4.jsonl").read_text(encoding="utf-8").splitlines())
    assert row.pop("tstamp") > 0
    assert row == {
        "question_id": 81,
        "answer_id": "llama-r4-81",
        "model_id": "llama-r4",
        "choices": [{"index": 0, "turns": answers[0]}],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"category": "math", "turns": ["a"]}, "field 'question_id'"),
        ({"question_id": 1, "category": "math", "turns": ["a", " "]}, "field 'turns': .*expected a list of texts"),
        ({"question_id": 1, "turns": ["a"]}, "field 'category'"),
    ],
)
def test_a_malformed_question_is_named(row, message, tmp_path):
    (tmp_path / "question.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"question\.jsonl, line 1, {message}"):
        read_questions(tmp_path / "question.jsonl")
