"""Questions answered in words: generate, then judge the text as the task does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from tensorpeft.evaluation.batches import map_batches
from tensorpeft.evaluation.chat_template import find_turn_end
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.tokens import TokenRow, base_model, device_of, encode_prompts, find_limit, pad_id, pad_tokens
from tensorpeft.tasks.task import Generation, Question, QuestionTask


def evaluate_generation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: QuestionTask,
    examples: Sequence[Question],
    options: EvaluationOptions,
    on_row: Callable[[int], object],
) -> tuple[dict[str, float], list[dict[str, Any]]]:  # metrics, rows
    """The means of what the task's score says about the generated texts."""
    assert task.score is not None
    generation = Generation(
        options.max_new_tokens or task.generation.max_new_tokens,
        options.num_beams or task.generation.num_beams,
        task.generation.stop,
    )
    limit = find_limit(model, tokenizer, options.max_length, reserved=generation.max_new_tokens)
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples], limit)
    if empty := [example.key for example, prompt in zip(examples, prompts, strict=True) if not prompt.ids]:
        raise ValueError(
            f"task {task.name}, row {empty[0]!r}: the prompt has no tokens, expected a text to go on from."
        )
    turn_end = find_turn_end(tokenizer) if options.chat else None
    texts = generate_texts(model, tokenizer, prompts, generation, options.batch_size, on_row, turn_end)
    rows = []
    for example, prompt, text in zip(examples, prompts, texts, strict=True):
        scored = task.score(text, example)
        row = {"key": example.key, "prompt": example.prompt, "generated": text, "answer": scored.answer}
        row |= {"gold": list(example.answers), "metrics": {name: float(v) for name, v in scored.metrics.items()}}
        rows.append(row | ({"cut": True} if prompt.cut else {}))
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return {name: sum(row["metrics"][name] for row in rows) / len(rows) for name in names}, rows


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenRow],
    generation: Generation,
    batch_size: int,
    on_row: Callable[[int], object],
    turn_end: int | None = None,  # a further token that ends an answer
    temperature: float | None = None,  # None: greedy, or beam search, nothing is drawn
) -> list[str]:
    """What the model writes after every prompt, up to the first of the stop texts.

    Of the model's own generation settings only its end-of-sequence tokens
    count, beside the tokenizer's: temperatures and repetition penalties belong to a chat.
    """
    device = device_of(model)

    @torch.no_grad()
    def compute(batch: list[TokenRow]) -> list[str]:
        inputs = pad_tokens(batch, tokenizer, device, left=True)
        width = inputs["input_ids"].shape[1]
        stopping = StoppingCriteriaList([_StopTexts(tokenizer, generation.stop, width)] if generation.stop else [])
        output = model.generate(**inputs, stopping_criteria=stopping)  # pyright: ignore[reportCallIssue]
        return [cut_at(text, generation.stop) for text in _decode(tokenizer, output[:, width:])]

    lengths = [len(prompt.ids) for prompt in prompts]
    settings: dict[str, Any] = {"max_new_tokens": generation.max_new_tokens, "num_beams": generation.num_beams}
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0}  # all tokens may be drawn
    settings |= {"do_sample": False} if temperature is None else drawn
    with generation_settings(model, tokenizer, turn_end, **settings):
        return map_batches(compute, prompts, lengths, batch_size, lambda indices: on_row(len(indices)))


@contextmanager
def generation_settings(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    turn_end: int | None = None,  # a further token that ends an answer
    **settings: Any,  # fields of transformers' GenerationConfig
) -> Iterator[list[int]]:
    """The model with these generation settings instead of its own, which would fill in whatever is left open.

    Yields the tokens that end an answer: the model's, the tokenizer's, and the one that is given.
    """
    base = base_model(model)
    own = base.generation_config
    of_model = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({end for end in (*of_model, tokenizer.eos_token_id, turn_end) if isinstance(end, int)})
    base.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=ends or None, pad_token_id=pad_id(tokenizer), **settings
    )
    try:
        yield ends
    finally:
        base.generation_config = own


class _StopTexts(StoppingCriteria):
    """Whether a row has written a stop text.

    Not transformers' own stop strings, which count a text that begins within the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._stop, self._prompt_length = tokenizer, stop, prompt_length
        # A token is at least one byte, so that a stop text that has just ended is within these.
        self._window = max(len(text.encode()) for text in stop) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # (rows,)
        written = input_ids[:, self._prompt_length :]
        tails = _decode(self._tokenizer, written[:, -self._window :])
        return torch.tensor([any(stop in tail for stop in self._stop) for tail in tails], device=input_ids.device)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> list[str]:
    """The texts as the model wrote them, without special tokens."""
    return tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop texts."""
    return text[: min([len(text), *(text.index(end) for end in stop if end in text)])]
