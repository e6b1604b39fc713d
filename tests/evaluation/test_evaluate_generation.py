import warnings

import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from evaluation.evaluated import CONFIGS, GPT2, LLAMA, adapt, sentence, word_tokenizer
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.tasks.task import Generation, Question, QuestionTask, Scored

LENGTHS = [2, 9, 1, 5, 12, 3, 3]
over_models = pytest.mark.parametrize("model", [LLAMA, GPT2], ids=lambda model: model.name)


def questions():
    return [Question(sentence(k, n), " w4", answers=("w4",), key=f"q{k}") for k, n in enumerate(LENGTHS)]


def score(text, question):
    words = text.split()
    answer = words[0] if words else None
    return Scored(answer, {"accuracy": float(answer in question.answers), "words": len(words) / 10})


def task(stop=(), **more):
    generation = Generation(**{"max_new_tokens": 8, "stop": stop, **more})
    return QuestionTask("words", "Which word?", read=None, parse=None, generation=generation, score=score)


def generate_alone(model, tokenizer, prompt, num_beams=1, new_tokens=8):
    inputs = tokenizer(prompt, return_tensors="pt")
    plain = GenerationConfig(
        max_new_tokens=new_tokens, num_beams=num_beams, do_sample=False, eos_token_id=3, pad_token_id=0, bos_token_id=2
    )
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=plain)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def generated(model, tokenizer, options=None, **more):
    found = evaluate_task(model, tokenizer, task(**more), questions(), options or EvaluationOptions(batch_size=3))
    return [row["generated"] for row in found.rows]


@over_models
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_every_text_is_that_of_its_prompt_alone(model, method, num_beams):
    adapted, tokenizer = adapt(model, method), word_tokenizer(bos=True)
    adapted.get_base_model().generation_config.eos_token_id = 3
    expected = [generate_alone(adapted, tokenizer, question.prompt, num_beams) for question in questions()]
    assert len(set(expected)) > 3
    assert generated(adapted, tokenizer, num_beams=num_beams) == expected
    one_by_one = EvaluationOptions(batch_size=1, num_beams=num_beams)
    assert generated(adapted, tokenizer, one_by_one) == expected


def test_rows_and_means():
    done = []
    adapted, tokenizer = adapt(LLAMA), word_tokenizer()
    found = evaluate_task(adapted, tokenizer, task(), questions(), EvaluationOptions(batch_size=4), done.append)
    assert (found.mode, found.num_rows, done) == ("generate", 7, [4, 3])
    for row, question in zip(found.rows, questions(), strict=True):
        text = generate_alone(adapted, tokenizer, question.prompt)
        assert row == {
            "key": question.key,
            "prompt": question.prompt,
            "generated": text,
            "answer": text.split()[0],
            "gold": ["w4"],
            "metrics": {"accuracy": float(text.split()[0] == "w4"), "words": len(text.split()) / 10},
        }
    assert found.metrics["words"] == pytest.approx(sum(len(row["generated"].split()) for row in found.rows) / 70)


def test_options_come_before_the_tasks_settings():
    adapted, tokenizer = adapt(LLAMA), word_tokenizer()
    texts = generated(adapted, tokenizer, EvaluationOptions(max_new_tokens=3, num_beams=2), num_beams=4)
    assert texts == [generate_alone(adapted, tokenizer, question.prompt, 2, 3) for question in questions()]


@over_models
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_text_ends_before_the_stop_text(model, num_beams):
    adapted, tokenizer = adapt(model), word_tokenizer()
    whole = generated(adapted, tokenizer, max_new_tokens=6)
    words = whole[4].split()
    assert len(words) > 4
    stop = (" ".join(words[2:4]), "never")  # of two tokens
    texts = generated(adapted, tokenizer, max_new_tokens=6, stop=stop, num_beams=num_beams)
    alone = [
        evaluate_task(adapted, tokenizer, task(stop, max_new_tokens=6, num_beams=num_beams), [question]).rows[0]
        for question in questions()
    ]
    assert texts == [row["generated"] for row in alone]
    if num_beams == 1:
        assert texts == [text.split(stop[0])[0] for text in whole]


def test_a_stop_text_that_begins_in_the_prompt_does_not_count():
    adapted, tokenizer = adapt(LLAMA), word_tokenizer()
    question = questions()[1]
    [first, *_] = generate_alone(adapted, tokenizer, question.prompt).split()
    stop = (f"{question.prompt.split()[-1]} {first}",)
    row = evaluate_task(adapted, tokenizer, task(stop), [question]).rows[0]
    assert row["generated"] == generate_alone(adapted, tokenizer, question.prompt)


def test_a_stop_text_ends_the_work():
    adapted, tokenizer = adapt(LLAMA), word_tokenizer()
    question, steps = questions()[1], []
    words = generate_alone(adapted, tokenizer, question.prompt).split()
    adapted.get_base_model().lm_head.register_forward_hook(lambda *_: steps.append(1))
    stop = (" ".join(words[2:4]),)  # of two tokens
    evaluate_task(adapted, tokenizer, task(stop, max_new_tokens=50), [question])
    assert len(steps) == 4


def test_the_settings_of_a_chat_neither_count_nor_warn(capfd):
    adapted, tokenizer = adapt(LLAMA), word_tokenizer()
    expected = generated(adapted, tokenizer)
    settings = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=5.0, max_length=4, eos_token_id=3, pad_token_id=0
    )
    adapted.get_base_model().generation_config = settings
    capfd.readouterr()
    transformers_logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generated(adapted, tokenizer) == expected
    transformers_logging.disable_propagation()
    assert capfd.readouterr().err == ""
    assert adapted.get_base_model().generation_config is settings


def test_texts_end_at_the_ends_of_the_model_and_of_the_tokenizer():
    adapted, tokenizer = adapt(LLAMA), word_tokenizer()
    question = questions()[4]
    words = generate_alone(adapted, tokenizer, question.prompt).split()
    end = tokenizer.convert_tokens_to_ids(words[3])
    adapted.get_base_model().generation_config.eos_token_id = [end]
    tokenizer.eos_token = "w95"
    row = evaluate_task(adapted, tokenizer, task(), [question]).rows[0]
    # The last word is the end, which is a word here, not one of the tokenizer's special tokens.
    assert row["generated"].split() == words[: words.index(words[3]) + 1]


def test_long_prompts_lose_their_beginning():
    adapted, tokenizer = adapt(GPT2), word_tokenizer(bos=True)
    found = evaluate_task(adapted, tokenizer, task(), questions(), EvaluationOptions(max_length=4, batch_size=3))
    cut = [" ".join(question.prompt.split()[-3:]) for question in questions()]
    assert [row["generated"] for row in found.rows] == [generate_alone(adapted, tokenizer, prompt) for prompt in cut]
    assert [row.get("cut", False) for row in found.rows] == [length > 3 for length in LENGTHS]
    long = [Question(sentence(1, 60), "", key="long")]  # of 40 positions, eight are for the answer
    [row] = evaluate_task(adapted, tokenizer, task(), long).rows
    prompt = " ".join(long[0].prompt.split()[-31:])
    assert row["generated"] == generate_alone(adapted, tokenizer, prompt)


def test_an_empty_prompt_is_named():
    with pytest.raises(ValueError, match="task words, row 'none': the prompt has no tokens"):
        evaluate_task(adapt(LLAMA), word_tokenizer(), task(), [Question("", "", key="none")])
