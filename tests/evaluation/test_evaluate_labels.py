import pytest
import torch
from peft import get_peft_model

from cases import Model, perturb
from evaluation.evaluated import CONFIGS, sentence, tiny_bert, word_tokenizer
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.tasks.task import LabelledText, LabelTask

NAMES = ("red", "green", "blue")
TOKENIZER = word_tokenizer(pairs=True)


def accuracy(labels, predictions):
    return sum(a == b for a, b in zip(labels, predictions, strict=True)) / len(labels)


def distance(labels, predictions):
    return sum(abs(a - b) for a, b in zip(labels, predictions, strict=True))


def task(names=NAMES):
    metrics = {"accuracy": accuracy} if names else {"distance": distance}
    return LabelTask("colours", "What colour?", read=None, parse=None, metrics=metrics, label_names=names)


def pairs(count=11, numbers=False):
    return [
        LabelledText((sentence(k, 1 + 7 * k % 12), sentence(50 + k, 2 + k % 3)), k / 4 if numbers else k % 3)
        for k in range(count)
    ]


def adapt(method, num_labels=3):
    model = Model("bert", lambda: tiny_bert(num_labels), ["query", "value", "intermediate.dense"], "SEQ_CLS")
    adapted = get_peft_model(model.fresh(), CONFIGS[method](target_modules=model.targets, task_type="SEQ_CLS"))
    perturb(adapted, scale=1.0)
    return adapted.eval()


def logits_of(model, example):
    """Those of one text alone, as BERT's users write it."""
    with torch.no_grad():
        return model(**TOKENIZER(*example.texts, return_tensors="pt")).logits[0].double()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_classes_are_those_of_every_text_alone(method, batch_size):
    model, examples, done = adapt(method), pairs(), []
    found = evaluate_task(model, TOKENIZER, task(), examples, EvaluationOptions(batch_size=batch_size), done.append)
    logits = [logits_of(model, example) for example in examples]
    predictions = [int(row.argmax()) for row in logits]
    assert len(set(predictions)) > 1
    assert [row["prediction"] for row in found.rows] == predictions
    losses = [float(row.exp().sum().log() - row[e.label]) for row, e in zip(logits, examples, strict=True)]
    assert [row["loss"] for row in found.rows] == pytest.approx(losses, abs=1e-5)
    right = sum(prediction == k % 3 for k, prediction in enumerate(predictions))
    assert found.metrics == {"accuracy": right / 11, "loss": pytest.approx(sum(losses) / 11, abs=1e-5)}
    assert (found.task, found.mode, found.num_rows, found.num_cut, sum(done)) == ("colours", "labels", 11, 0, 11)
    assert found.rows[2]["texts"] == list(examples[2].texts)
    assert found.rows[2]["label_name"] == "blue"
    assert found.rows[2]["prediction_name"] == NAMES[predictions[2]]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_numbers_are_the_outputs(batch_size):
    model, examples = adapt("dota", num_labels=1), pairs(numbers=True)
    found = evaluate_task(model, TOKENIZER, task(()), examples, EvaluationOptions(batch_size=batch_size))
    values = [float(logits_of(model, example)) for example in examples]
    assert [row["prediction"] for row in found.rows] == pytest.approx(values, abs=1e-5)
    errors = [value - k / 4 for k, value in enumerate(values)]
    assert found.metrics["distance"] == pytest.approx(sum(map(abs, errors)), abs=1e-4)
    assert found.metrics["loss"] == pytest.approx(sum(error**2 for error in errors) / 11, abs=1e-4)


def test_long_texts_are_cut_by_the_tokenizer_and_counted():
    model, examples = adapt("lorta"), pairs()
    found = evaluate_task(model, TOKENIZER, task(), examples, EvaluationOptions(max_length=9))
    lengths = [len(TOKENIZER(*example.texts)["input_ids"]) for example in examples]
    assert [row.get("cut", False) for row in found.rows] == [length > 9 for length in lengths]
    assert 0 < found.num_cut < 11
    for row, example in zip(found.rows, examples, strict=True):
        inputs = TOKENIZER(*example.texts, return_tensors="pt", truncation=True, max_length=9)
        with torch.no_grad():
            assert row["prediction"] == int(model(**inputs).logits.argmax())


def test_texts_beyond_the_models_positions_are_cut():
    long = [LabelledText((sentence(1, 60), sentence(2, 5)), 0)]
    assert evaluate_task(adapt("dota"), TOKENIZER, task(), long).num_cut == 1


def test_outputs_are_matched_by_name_where_the_model_names_them():
    model, examples = adapt("dota"), pairs()
    before = evaluate_task(model, TOKENIZER, task(), examples)
    model.get_base_model().config.id2label = {0: "Blue", 1: "RED", 2: "green"}
    after = evaluate_task(model, TOKENIZER, task(), examples)
    moved = {0: 2, 1: 0, 2: 1}  # output -> class
    assert [row["prediction"] for row in after.rows] == [moved[row["prediction"]] for row in before.rows]


def test_a_head_of_another_task_is_refused():
    with pytest.raises(ValueError, match=r"the model has 1 outputs, expected 3 classes \(red, green, blue\)"):
        evaluate_task(adapt("dota", num_labels=1), TOKENIZER, task(), pairs())
    with pytest.raises(ValueError, match="the model has 3 outputs, expected 1 number"):
        evaluate_task(adapt("dota"), TOKENIZER, task(()), pairs())
