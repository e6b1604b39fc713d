import pytest

from evaluation.evaluated import LLAMA, adapt, word_tokenizer
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.tasks.task import LabelTask, PreferenceTask, Question, QuestionTask, Scored

ROWS = [Question("w4 w5", " w6", choices=(" w6", " w7"), gold=0)]
SCORED = QuestionTask("scored", "", read=None, parse=None, score=lambda text, question: Scored(None, {"accuracy": 1.0}))
UNSCORED = QuestionTask("unscored", "", read=None, parse=None)


@pytest.mark.parametrize(
    ("task", "mode", "expected"),
    [
        (SCORED, None, "generate"),
        (UNSCORED, None, "loss"),
        (SCORED, "likelihood", "likelihood"),
        (UNSCORED, "likelihood", "likelihood"),
        (SCORED, "loss", "loss"),
    ],
)
def test_the_mode_suits_the_task(task, mode, expected):
    options = EvaluationOptions(mode, max_new_tokens=2)
    assert evaluate_task(adapt(LLAMA), word_tokenizer(), task, ROWS, options).mode == expected


def test_a_mode_that_does_not_suit_the_task_is_refused():
    with pytest.raises(ValueError, match="mode='generate': the task unscored cannot score a text"):
        evaluate_task(LLAMA.fresh(), word_tokenizer(), UNSCORED, ROWS, EvaluationOptions("generate"))
    for task in (LabelTask("labels", "", None, None, {}), PreferenceTask("pairs", "", None, None)):
        with pytest.raises(ValueError, match=f"mode='loss': only questions have modes, and {task.name} has none"):
            evaluate_task(LLAMA.fresh(), word_tokenizer(), task, ROWS, EvaluationOptions("loss"))


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="task scored: no examples"):
        evaluate_task(LLAMA.fresh(), word_tokenizer(), SCORED, [])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_the_model_is_left_as_it_was(fails, trains):
    model = adapt(LLAMA).train(trains)
    frozen = next(module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm")
    frozen.training = not trains
    before = {name: module.training for name, module in model.named_modules()}

    def on_row(number):
        assert not any(module.training for module in model.modules())
        if fails:
            raise KeyboardInterrupt

    try:
        evaluate_task(model, word_tokenizer(), UNSCORED, ROWS, on_row=on_row)
    except KeyboardInterrupt:
        assert fails
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
