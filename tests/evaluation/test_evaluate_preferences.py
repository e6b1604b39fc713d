import math

import pytest
import torch

from evaluation.evaluated import CONFIGS, LLAMA, adapt, sentence, token_log_probs, word_tokenizer
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.tasks.task import Preference, PreferenceTask

TASK = PreferenceTask("pairs", "Which is better?", read=None, parse=None)
ROWS = [
    Preference(sentence(k, 1 + 5 * k % 9), " " + sentence(20 + k, 1 + k % 4), " " + sentence(40 + k, 3), f"p{k}")
    for k in range(8)
]
NAMES = {"loss": "eval_loss", "reward margin": "eval_rewards/margins", "accuracy": "eval_rewards/accuracies"}


def small_step(method):
    """An adapter that has moved little, as DPO's do: rewards of order one."""
    adapted = adapt(LLAMA, method)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "_update." in name:
                parameter *= 0.9
    return adapted


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_metrics_are_those_of_trls_trainer(method, batch_size, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    adapted, tokenizer = small_step(method), word_tokenizer(bos=True)
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path),
        beta=0.05,
        per_device_eval_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    dataset = datasets.Dataset.from_list(
        [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in ROWS]
    )
    found = evaluate_task(adapted, tokenizer, TASK, ROWS, EvaluationOptions(batch_size=batch_size, beta=0.05))
    trainer = trl.DPOTrainer(
        adapted, args=arguments, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
    )
    # TRL's reference for a trained adapter is a copy of it; the base, as here, is what a new adapter has.
    trainer.model.delete_adapter("ref")
    expected = trainer.evaluate()
    assert 0 < expected["eval_rewards/accuracies"] < 1
    assert found.metrics == pytest.approx({name: expected[key] for name, key in NAMES.items()}, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_metrics_are_those_of_the_papers_formula(batch_size):
    adapted, base, tokenizer, beta, done = adapt(LLAMA), LLAMA.fresh(), word_tokenizer(), 0.3, []
    options = EvaluationOptions(batch_size=batch_size, beta=beta)
    found = evaluate_task(adapted, tokenizer, TASK, ROWS, options, done.append)

    def reward(prompt, response):
        ids = [*tokenizer(prompt + response)["input_ids"], 3]
        start = len(tokenizer(prompt)["input_ids"]) - 1
        return beta * (sum(token_log_probs(adapted, ids)[start:]) - sum(token_log_probs(base, ids)[start:]))

    losses, margins = [], []
    for row, example in zip(found.rows, ROWS, strict=True):
        chosen, rejected = reward(example.prompt, example.chosen), reward(example.prompt, example.rejected)
        assert row["reward_of_chosen"] == pytest.approx(chosen, abs=1e-4)
        assert row["reward_of_rejected"] == pytest.approx(rejected, abs=1e-4)
        assert row["metrics"]["accuracy"] == float(chosen > rejected)
        margins.append(chosen - rejected)
        losses.append(-math.log(1 / (1 + math.exp(-margins[-1]))))
    assert [row["key"] for row in found.rows] == [example.key for example in ROWS]
    assert found.metrics["loss"] == pytest.approx(sum(losses) / 8, abs=1e-4)
    assert found.metrics["reward margin"] == pytest.approx(sum(margins) / 8, abs=1e-4)
    assert found.metrics["accuracy"] == sum(margin > 0 for margin in margins) / 8
    assert (found.mode, sum(done)) == ("preferences", 8)


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM without an adapter is its own base\. Pass a PeftModel"):
        evaluate_task(LLAMA.fresh(), word_tokenizer(), TASK, ROWS)


def test_pairs_without_room_for_a_response_are_left_out_and_marked():
    adapted, tokenizer = adapt(LLAMA), word_tokenizer()
    rows = [Preference("w4 w5 w6", " w7", " w8", "long"), Preference("w4", " w5", " w6", "short")]
    found = evaluate_task(adapted, tokenizer, TASK, rows, EvaluationOptions(max_length=3))
    assert [row.get("left_out", False) for row in found.rows] == [True, False]
    assert found.metrics == evaluate_task(adapted, tokenizer, TASK, rows[1:]).metrics
    with pytest.raises(ValueError, match="task pairs: no pair has both responses within max_length=1"):
        evaluate_task(adapted, tokenizer, TASK, rows, EvaluationOptions(max_length=1))
