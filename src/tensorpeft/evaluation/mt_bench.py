"""MT-Bench's questions of two turns, answered in the form that FastChat's judge reads. What they are worth GPT-4 says.

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685; the temperatures and
the files' form are those of FastChat's llm_judge.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tensorpeft.evaluation.chat_template import find_turn_end, write_chat
from tensorpeft.evaluation.generation import generate_texts
from tensorpeft.evaluation.tokens import encode_prompts, find_limit
from tensorpeft.tasks.instructions import Message, conversation_prompt
from tensorpeft.tasks.records import read_json_lines
from tensorpeft.tasks.task import Generation

MAX_NEW_TOKENS = 1024  # FastChat's
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER_TEMPERATURE = 0.7
_NEXT_TURN = "### Instruction:"  # what a model that was trained on Alpaca's template may go on with


@dataclass(frozen=True)
class DialogueQuestion:
    """What a user asks, turn by turn.

    Args:
        key: question_id.
        category: decides the temperature.
        turns: at least one.
    """

    key: Any
    category: str
    turns: tuple[str, ...]

    @property
    def temperature(self) -> float:
        """Of all its answers; 0: the likeliest tokens."""
        return _TEMPERATURES.get(self.category, _OTHER_TEMPERATURE)


def read_questions(path: Path) -> list[DialogueQuestion]:
    """The questions of a published question.jsonl.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks a field, or has a wrong one; names file, line and field.
    """
    questions = []
    for record in read_json_lines(path):
        record.number("question_id")
        turns = record.items("turns")
        if not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise record.error("turns", "a list of texts that are not empty")
        questions.append(DialogueQuestion(record.fields["question_id"], record.text("category"), tuple(turns)))
    return questions


def answer_questions(
    model: nn.Module,  # in evaluation mode
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[DialogueQuestion],
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    chat: bool = False,
    seed: int = 0,
    on_turn: Callable[[int], object] = lambda number: None,  # called with how many turns were answered since
) -> list[list[str]]:  # of every question, an answer per turn
    """What the model answers; in later turns it reads the earlier ones with its own answers.

    Args:
        model: whose answers.
        tokenizer: its own, with a chat template where ``chat`` is True.
        questions: all that is asked; those of one temperature are answered together.
        batch_size: conversations that are gone on with at once.
        max_new_tokens: of an answer, at most.
        chat: write the conversations in the tokenizer's chat template, not in Alpaca's.
        seed: of what is drawn; what is drawn also depends on the batch size.
        on_turn: told how far it is.

    Raises:
        ValueError: the tokenizer has no chat template, or an answer alone is longer than what the model reads.
    """
    limit = find_limit(model, tokenizer, None, reserved=max_new_tokens)
    end = find_turn_end(tokenizer) if chat else None
    generation = Generation(max_new_tokens, stop=() if chat else (_NEXT_TURN,))
    histories: dict[int, list[Message]] = {index: [] for index in range(len(questions))}
    torch.manual_seed(seed)
    for temperature in sorted({question.temperature for question in questions}):
        for turn in range(max(len(question.turns) for question in questions)):
            asked = [
                index
                for index, question in enumerate(questions)
                if question.temperature == temperature and turn < len(question.turns)
            ]
            for index in asked:
                histories[index].append(Message("user", questions[index].turns[turn]))
            texts = [_write(tokenizer, histories[index], chat) for index in asked]
            prompts = encode_prompts(tokenizer, texts, limit)
            answers = generate_texts(
                model, tokenizer, prompts, generation, batch_size, on_turn, end, temperature or None
            )
            for index, answer in zip(asked, answers, strict=True):
                histories[index].append(Message("assistant", answer.strip()))
    return [[text for role, text in histories[k] if role == "assistant"] for k in range(len(questions))]


def as_answer_file(
    questions: Sequence[DialogueQuestion],
    answers: Sequence[Sequence[str]],
    model_id: str,
) -> list[Mapping[str, Any]]:
    """The rows of FastChat's model_answer/MODEL_ID.jsonl."""
    return [
        {
            "question_id": question.key,
            "answer_id": f"{model_id}-{question.key}",
            "model_id": model_id,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": time.time(),
        }
        for question, turns in zip(questions, answers, strict=True)
    ]


def _write(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat: bool) -> str:
    if chat:
        return write_chat(tokenizer, [{"role": role, "content": text} for role, text in messages])
    return conversation_prompt(messages)
