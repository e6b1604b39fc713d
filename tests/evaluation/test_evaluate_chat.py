import pytest
import torch
from transformers import GenerationConfig

from evaluation.evaluated import LLAMA, adapt, sentence, word_tokenizer
from tensorpeft.evaluation import EvaluationOptions, evaluate_task
from tensorpeft.evaluation.chat_template import as_chat, find_turn_end
from tensorpeft.tasks.task import Generation, LabelTask, Question, QuestionTask, Scored

# A user's turn begins with w4, the model's with w5 and ends with END.
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ 'w4 ' if turn.role == 'user' else 'w5 ' }}{{ turn.content }}"
    "{{ ' END\n' if turn.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
)
QUESTIONS = [Question(sentence(k, 1 + k), f" {sentence(20 + k, 1 + k % 3)}", ("w9",), key=f"q{k}") for k in range(5)]
over_beginnings = pytest.mark.parametrize("bos", [False, True])


def chat_tokenizer(bos: bool, end: str = "w6"):
    """One that writes a beginning itself, or not; its template always writes one."""
    tokenizer = word_tokenizer(bos)
    tokenizer.chat_template = TEMPLATE.replace("END", end)
    return tokenizer


def turns(question: Question, response: str | None = None):
    roles = {"user": question.prompt} | ({} if response is None else {"assistant": response.strip()})
    return [{"role": role, "content": content} for role, content in roles.items()]


def ids_of(tokenizer, conversation, **more):
    return tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True, **more)["input_ids"]


@over_beginnings
def test_prompt_and_response_have_the_tokens_of_the_conversation(bos):
    tokenizer = chat_tokenizer(bos)
    for question in QUESTIONS:
        asked = as_chat(tokenizer, question)
        whole = tokenizer(asked.prompt + asked.response)["input_ids"]
        assert whole == ids_of(tokenizer, turns(question, question.response))
        assert tokenizer(asked.prompt)["input_ids"] == ids_of(tokenizer, turns(question), add_generation_prompt=True)
        assert whole[-1] == find_turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("w6")
        assert (asked.answers, asked.key) == (question.answers, question.key)


def test_choices_lose_what_separates_them_from_a_plain_prompt():
    asked = as_chat(chat_tokenizer(bos=True), Question("w7", " w8", choices=(" w8", " w9"), gold=0))
    assert asked.choices == ("w8", "w9")


def test_a_template_may_end_a_turn_with_no_token_of_its_own():
    assert find_turn_end(chat_tokenizer(bos=True, end="")) is None


@over_beginnings
def test_an_answer_is_that_of_an_ordinary_chat_and_ends_with_the_turn(bos):
    model = adapt(LLAMA)

    def generate(tokenizer, question):
        ids = torch.tensor([ids_of(tokenizer, turns(question), add_generation_prompt=True)])
        plain = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=3, pad_token_id=0)
        with torch.no_grad():
            return tokenizer.decode(model.generate(ids, generation_config=plain)[0, ids.shape[1] :]).split()

    free = [generate(chat_tokenizer(bos), question) for question in QUESTIONS]
    end = next(word for word in free[0][1:] if word != free[0][0])  # one that the model does write
    tokenizer = chat_tokenizer(bos, end)
    expected = [" ".join([*words, end][: [*words, end].index(end) + 1]) for words in free]
    score = lambda text, question: Scored(text, {"accuracy": 0.0})  # noqa: E731
    task = QuestionTask("words", "", None, None, Generation(max_new_tokens=8), score)
    found = evaluate_task(model, tokenizer, task, QUESTIONS, EvaluationOptions(batch_size=2, chat=True))
    texts = [row["generated"] for row in found.rows]
    assert [text.split() for text in texts] == [text.split()[:8] for text in expected]
    assert len(texts[0].split()) < 8
    assert [row["prompt"] for row in found.rows] == [question.prompt for question in QUESTIONS]
    plain = evaluate_task(model, tokenizer, task, QUESTIONS, EvaluationOptions(batch_size=2))
    assert [row["generated"] for row in plain.rows] != texts


def test_a_loss_is_that_of_the_conversation():
    tokenizer, task = chat_tokenizer(bos=True, end="</s>"), QuestionTask("replies", "", None, None)
    model = adapt(LLAMA)
    found = evaluate_task(model, tokenizer, task, QUESTIONS, EvaluationOptions(batch_size=2, chat=True))
    for row, question in zip(found.rows, QUESTIONS, strict=True):
        ids = torch.tensor([ids_of(tokenizer, turns(question, question.response))])
        start = len(ids_of(tokenizer, turns(question), add_generation_prompt=True))
        labels = torch.where(torch.arange(ids.shape[1]) < start, -100, ids)
        with torch.no_grad():
            assert row["loss"] == pytest.approx(model(ids, labels=labels).loss.item(), abs=1e-5)
        assert row["tokens"] == ids.shape[1] - start


def test_what_cannot_be_asked_in_a_chat_is_refused():
    with pytest.raises(ValueError, match="its tokenizer has no chat template"):
        as_chat(word_tokenizer(), QUESTIONS[0])
    with pytest.raises(ValueError, match="row 'text': it has no prompt"):
        as_chat(chat_tokenizer(bos=True), Question("", "w5", key="text"))
    tokenizer = chat_tokenizer(bos=True)
    tokenizer.chat_template = "{{ messages | length }} {{ messages[0].content }}"
    with pytest.raises(ValueError, match="something else once the answer is there"):
        as_chat(tokenizer, QUESTIONS[0])
    labels = LabelTask("labels", "", None, None, {})
    with pytest.raises(ValueError, match="chat=True: only questions are asked in a chat, and labels has none"):
        evaluate_task(LLAMA.fresh(), tokenizer, labels, [], EvaluationOptions(chat=True))
