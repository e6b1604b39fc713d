import pytest

from evaluation.evaluated import GPT2, LLAMA, adapt, merging_tokenizer, sentence, token_log_probs, word_tokenizer
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.tasks.task import Question, QuestionTask

TASK = QuestionTask("choices", "Which one?", read=None, parse=None)


def questions():
    """Prompts of 1 to 9 words with two to four choices of one to four words."""
    return [
        Question(
            sentence(k, 1 + 5 * k % 9),
            "",
            choices=tuple(" " + sentence(10 * k + c, 1 + (k + c) % 4) for c in range(2 + k % 3)),
            gold=k % 2,
            key=f"q{k}",
        )
        for k in range(8)
    ]


def naive(model, tokenizer, example):
    """Sum over a choice's words, one forward pass per word."""
    num_prompt = len(tokenizer(example.prompt)["input_ids"])
    sums = []
    for choice in example.choices:
        ids = tokenizer(example.prompt + choice)["input_ids"]
        sums.append(sum(token_log_probs(model, ids)[num_prompt - 1 :]))
    return sums


@pytest.mark.parametrize(("model", "method"), [(LLAMA, "dota"), (LLAMA, "lorta"), (GPT2, "dota")])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_likelihoods_are_those_of_a_loop(model, method, batch_size):
    adapted, tokenizer, done = adapt(model, method), word_tokenizer(bos=True), []
    options = EvaluationOptions("likelihood", batch_size=batch_size)
    found = evaluate_task(adapted, tokenizer, TASK, questions(), options, done.append)
    right = right_by_length = 0
    for row, example in zip(found.rows, questions(), strict=True):
        sums = naive(adapted, tokenizer, example)
        assert row["log_probs"] == pytest.approx(sums, rel=1e-5, abs=1e-5)
        per_character = [p / (len(choice) - 1) for p, choice in zip(sums, example.choices, strict=True)]
        assert row["prediction"] == sums.index(max(sums))
        assert row["prediction_by_length"] == per_character.index(max(per_character))
        right += row["prediction"] == example.gold
        right_by_length += row["prediction_by_length"] == example.gold
        assert (row["key"], row["choices"], row["gold"]) == (example.key, list(example.choices), example.gold)
    assert found.metrics == {"accuracy": right / 8, "accuracy, by length": right_by_length / 8}
    assert any(row["prediction"] != row["prediction_by_length"] for row in found.rows)
    assert (found.mode, found.num_rows, sum(done)) == ("likelihood", 8, 8)


def test_every_right_choice_is_right():
    adapted, tokenizer, metrics = adapt(LLAMA), word_tokenizer(bos=True), []
    for also_gold in [(), *((index,) for index in range(1, 4))]:
        question = Question("w4 w5", "", choices=(" w6", " w7", " w8", " w9"), gold=0, also_gold=also_gold)
        [row] = evaluate_task(adapted, tokenizer, TASK, [question], EvaluationOptions("likelihood")).rows
        right = {0, *also_gold}
        assert row["metrics"]["accuracy"] == (row["prediction"] in right)
        assert row["metrics"]["accuracy, by length"] == (row["prediction_by_length"] in right)
        metrics.append(row["metrics"]["accuracy"])
    assert max(metrics[1:]) == 1


def test_a_token_of_prompt_and_choice_counts_for_every_choice():
    adapted, tokenizer = adapt(LLAMA), merging_tokenizer()
    question = Question("dca", "", choices=("b", "d", "cdb"), gold=1, key="merged")
    [row] = evaluate_task(adapted, tokenizer, TASK, [question], EvaluationOptions("likelihood")).rows
    texts = [["d", "c", "ab"], ["d", "c", "a", "d"], ["d", "c", "a", "cd", "b"]]
    ids = [[2, *tokenizer.convert_tokens_to_ids(text)] for text in texts]
    assert row["log_probs"] == pytest.approx([sum(token_log_probs(adapted, i)[2:]) for i in ids], abs=1e-5)


def test_choices_longer_than_the_limit_lose_the_beginning_of_their_prompt():
    adapted, tokenizer = adapt(LLAMA), word_tokenizer()
    question = Question("w4 w5 w6 w7", "", choices=(" w8 w9", " w10"), gold=0)
    options = EvaluationOptions("likelihood", max_length=4)
    found = evaluate_task(adapted, tokenizer, TASK, [question], options)
    short = Question("w6 w7", "", choices=question.choices, gold=0)
    assert found.rows[0]["log_probs"] == pytest.approx(naive(adapted, tokenizer, short), abs=1e-5)
    assert found.num_cut == 1


def test_of_equal_choices_the_first_is_the_answer():
    question = Question("w4", "", choices=(" w5", " w5"), gold=1)
    found = evaluate_task(adapt(LLAMA), word_tokenizer(), TASK, [question], EvaluationOptions("likelihood"))
    assert found.rows[0]["prediction"] == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Question("w4", " w5", key="q9"), "row 'q9': got 0 choices and gold=None, expected choices and which"),
        (Question("w4", "", choices=(" w5",), gold=1, key="q9"), "got 1 choices and gold=1"),
        (Question("w4", "", choices=(" w5", " "), gold=0, key="q9"), "row 'q9': the choice ' ' is blank"),
    ],
)
def test_a_question_that_cannot_be_chosen_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        evaluate_task(adapt(LLAMA), word_tokenizer(), TASK, [*questions(), bad], EvaluationOptions("likelihood"))
