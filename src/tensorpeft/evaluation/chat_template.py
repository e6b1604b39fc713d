"""Questions as a model's chat template asks them: what is trained in a chat is then answered in any chat."""

import dataclasses

from transformers import PreTrainedTokenizerBase

from tensorpeft.tasks.task import Question


def as_chat(
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
) -> Question:
    """The question as a user's first turn, its response and choices as the model's turn.

    The prompt is what the template writes up to where the model goes on. The response is what the template then writes
    of it, up to the end of the turn; of what separates a plain prompt from a plain response nothing is left. Where the
    tokenizer begins every text itself, the template's own beginning is left out, so that there is one.

    Raises:
        ValueError: the tokenizer has no chat template, the template writes a question otherwise once it is answered,
            or there is no prompt to ask.
    """
    if not question.prompt.strip():
        raise ValueError(
            f"row {question.key!r}: it has no prompt, and a chat begins with one. Leave chat out for plain texts."
        )
    turns = [{"role": "user", "content": question.prompt}]
    prompt = write_chat(tokenizer, turns)
    answered = write_chat(tokenizer, [*turns, {"role": "assistant", "content": question.response.strip()}])
    if not answered.startswith(prompt):
        raise ValueError(
            f"{tokenizer.name_or_path}: its chat template writes {prompt[-40:]!r} before an answer, and something else "
            "once the answer is there, so that a response cannot be trained after it. Leave chat out."
        )
    return dataclasses.replace(
        question,
        prompt=prompt,
        response=answered.removeprefix(prompt).rstrip(),
        choices=tuple(choice.strip() for choice in question.choices),
    )


def find_turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends the model's turn in the chat template; None: the template has no such token.

    Raises:
        ValueError: see `as_chat`.
    """
    response = as_chat(tokenizer, Question(prompt="Question", response="Answer")).response
    ids = tokenizer(response.rpartition("Answer")[2], add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None  # pyright: ignore[reportReturnType]


def write_chat(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, str]],  # role and content, as chat templates have them
) -> str:
    """A conversation as text; where the last turn is the user's, up to where the answer begins.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template. Take a model that is made to chat, or "
            "leave chat out."
        )
    is_asked = turns[-1]["role"] == "user"
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=is_asked, tokenize=False)
    assert isinstance(text, str)
    begins_itself = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]  # pyright: ignore[reportIndexIssue]
    return text.removeprefix(str(tokenizer.bos_token)) if begins_itself else text
