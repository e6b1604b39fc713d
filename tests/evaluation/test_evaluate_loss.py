import math

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from evaluation.evaluated import LLAMA, adapt, sentence, token_log_probs, word_tokenizer
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.tasks.task import Question, QuestionTask

TASK = QuestionTask("replies", "What follows?", read=None, parse=None)
ROWS = [Question(sentence(k, 1 + 5 * k % 9), " " + sentence(40 + k, 1 + k % 4), key=f"q{k}") for k in range(8)]
TEXTS = [Question("", sentence(k, 3 + 4 * k % 7), key=f"t{k}") for k in range(6)]


@pytest.mark.parametrize(
    ("method", "batch_size", "bos"), [("dota", 1, True), ("dota", 3, False), ("lorta", 3, True), ("lorta", 1, False)]
)
def test_the_loss_of_responses_is_that_of_a_loop(method, batch_size, bos):
    adapted, tokenizer = adapt(LLAMA, method), word_tokenizer(bos)
    found = evaluate_task(adapted, tokenizer, TASK, ROWS + TEXTS, EvaluationOptions(batch_size=batch_size))
    total = count = 0
    for row, example in zip(found.rows, ROWS + TEXTS, strict=True):
        ids = [*tokenizer(example.prompt + example.response)["input_ids"], 3]
        num_prompt = max(len(tokenizer(example.prompt)["input_ids"]), 1)
        expected = token_log_probs(adapted, ids)[num_prompt - 1 :]
        assert row["tokens"] == len(expected)
        assert row["loss"] == pytest.approx(-sum(expected) / len(expected), abs=1e-5)
        total, count = total + sum(expected), count + len(expected)
    assert found.mode == "loss"
    assert found.metrics["loss"] == pytest.approx(-total / count, abs=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-4)


@pytest.mark.parametrize("column", ["prompt and completion", "text"])
def test_the_loss_is_that_of_trls_trainer(column, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    adapted, tokenizer = adapt(LLAMA), word_tokenizer(bos=True)
    if column == "text":
        examples, rows = TEXTS, [{"text": example.response} for example in TEXTS]
    else:
        examples, rows = ROWS, [{"prompt": example.prompt, "completion": example.response} for example in ROWS]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=len(rows),  # in one batch, every token weighs the same
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    dataset = datasets.Dataset.from_list(rows)
    found = evaluate_task(adapted, tokenizer, TASK, examples, EvaluationOptions(batch_size=3))
    trainer = trl.SFTTrainer(
        adapted, arguments, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
    )
    assert found.metrics["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)


def test_virtual_tokens_before_a_text_are_no_part_of_it():
    tokenizer = word_tokenizer()
    model = get_peft_model(LLAMA.fresh(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    found = evaluate_task(model, tokenizer, TASK, [Question("w4", " w5 w6", key="q")])
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([[4, 5, 6, 3]])).logits[0, 3:].log_softmax(-1)
    expected = log_probs[0, 5] + log_probs[1, 6] + log_probs[2, 3]
    assert found.metrics["loss"] == pytest.approx(-expected.item() / 3, abs=1e-5)


def test_a_row_without_room_for_its_response_is_left_out_and_marked():
    adapted, tokenizer = adapt(LLAMA), word_tokenizer()
    rows = [Question("w4 w5 w6", " w7", key="long"), Question("w4", " w5 w6 w7", key="cut"), Question("w4", " w5")]
    found = evaluate_task(adapted, tokenizer, TASK, rows, EvaluationOptions(max_length=3))
    assert [(row["tokens"], row.get("cut", False)) for row in found.rows] == [(0, True), (2, True), (2, False)]
    assert (found.rows[0]["loss"], found.num_left_out, found.num_cut) == (None, 1, 2)
    expected = [*token_log_probs(adapted, [4, 5, 6]), *token_log_probs(adapted, [4, 5, 3])]
    assert found.metrics["loss"] == pytest.approx(-sum(expected) / 4, abs=1e-5)
    with pytest.raises(ValueError, match="task replies: no row has a token of its response within max_length=1"):
        evaluate_task(adapted, tokenizer, TASK, rows, EvaluationOptions(max_length=1))
