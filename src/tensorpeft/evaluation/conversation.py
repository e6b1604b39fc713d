"""A conversation with a model and with its adapter at once: two histories, two answers that grow together."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tensorpeft.evaluation.generation import generation_settings
from tensorpeft.evaluation.tokens import TokenRow, device_of, find_limit, pad_tokens

Message = dict[str, str]  # role and content, as chat templates have them
_BASE = "__base__"  # PEFT's name, in a mixed batch, for the row without adapter


class Stop(StoppingCriteria):
    """Ends all answers at the next token once `requested` is set."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # (rows,)
        """As generate calls it at every token."""
        return torch.full((len(input_ids),), self.requested, device=input_ids.device)


class Conversation:
    """What was said so far, to the base and to the adapter, and what they answer.

    Args:
        model: with one adapter, in evaluation mode.
        tokenizer: its chat template makes the prompts; without one the text is gone on with.
        system: first message of every conversation.
        max_new_tokens: of an answer, at most; None: 256, or half of what a short model reads.
        temperature: None: greedy.
        seed: of what is drawn at a temperature.

    Raises:
        ValueError: the adapter's task is not causal language modelling, a setting is out of range, or the template
            takes no system message.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        if (kind := model.active_peft_config.task_type) not in (None, "CAUSAL_LM"):
            raise ValueError(f"the adapter's task is {kind}: expected CAUSAL_LM, a model that writes text.")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: expected 1 or more.")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature={temperature}: expected more than 0; leave it out for the likeliest tokens.")
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        reads = find_limit(model, tokenizer, None)
        most = max_new_tokens or (256 if reads is None else min(256, reads // 2))
        self._limit = find_limit(model, tokenizer, None, reserved=most)
        self._settings: dict[str, Any] = {"max_new_tokens": most, "do_sample": temperature is not None}
        if temperature is not None:
            # All tokens may be drawn: transformers' own default is the likeliest 50.
            self._settings |= {"temperature": temperature, "top_k": 0}
            torch.manual_seed(seed)
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.has_template = self._tokenizer.chat_template is not None
        greeting = self._encode([{"role": "user", "content": "Hello"}])
        self.together = answers_together(model, greeting)
        self.forget()

    def forget(self) -> None:
        """Begin a new conversation."""
        self._histories: tuple[list[Message], list[Message]] = ([], [])

    def ask(
        self,
        question: str,
        on_answer: Callable[[int, str], object],  # 0 for the base or 1 for the adapter, its answer so far
        stop: Stop,
    ) -> bool:
        """Answers, and keeps question and answers for the next; whether old turns had to be left out for them.

        Raises:
            ValueError: the question alone is longer than the model reads, or has no tokens.
        """
        message = {"role": "user", "content": question}
        length = len(self._encode([message]))
        if length == 0 or (self._limit is not None and length > self._limit):
            most = (
                "" if self._limit is None else f" to {self._limit}, with {self._settings['max_new_tokens']} to answer"
            )
            raise ValueError(f"The question makes {length} tokens, the model reads 1{most}: ask another way.")
        prompts, shortened = [], False
        for history in self._histories:
            history.append(message)
            prompts.append(self._encode(history))
            while self._limit is not None and len(prompts[-1]) > self._limit:
                del history[:2]  # a question and its answer: templates want them in turns
                prompts[-1], shortened = self._encode(history), True
        answers = ["", ""]

        def keep(index: int, text: str) -> None:
            answers[index] = text
            on_answer(index, text)

        if self.together:
            self._generate(prompts, [0, 1], keep, stop, adapter_names=[_BASE, self._model.active_adapter])
        else:
            for index in (0, 1):
                if not stop.requested:
                    with self._model.disable_adapter() if index == 0 else nullcontext():
                        self._generate([prompts[index]], [index], keep, stop)
        for history, answer in zip(self._histories, answers, strict=True):
            history.append({"role": "assistant", "content": answer})
        return shortened

    def _encode(self, messages: list[Message]) -> list[int]:
        """Tokens of the system message and these, up to where the answer begins."""
        messages = [*self._system, *messages]
        if not self.has_template:
            ends = ["" if message["role"] == "user" else "\n" for message in messages]
            text = "".join(message["content"] + end for message, end in zip(messages, ends, strict=True))
            return self._tokenizer(text, verbose=False)["input_ids"]
        try:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            advice = " Leave --system out." if self._system else ""
            raise ValueError(f"the model's chat template refuses the messages: {error}.{advice}") from error

    def _generate(
        self,
        prompts: list[list[int]],
        indices: list[int],  # of the answers
        on_answer: Callable[[int, str], object],
        stop: Stop,
        **more: Any,
    ) -> None:
        rows = [TokenRow(ids, len(ids)) for ids in prompts]
        inputs = pad_tokens(rows, self._tokenizer, device_of(self._model), left=True)
        with generation_settings(self._model, self._tokenizer, **self._settings) as ends:
            streamer = _AnswerStreamer(self._tokenizer, ends, lambda row, text: on_answer(indices[row], text))
            self._model.generate(**inputs, **more, streamer=streamer, stopping_criteria=StoppingCriteriaList([stop]))


class _AnswerStreamer(BaseStreamer):
    """Tells each row's answer so far at every token; transformers' own streamers take one row."""

    def __init__(
        self,
        tokenizer: Any,
        ends: list[int],  # tokens that end an answer
        on_answer: Callable[[int, str], object],  # row, text
    ) -> None:
        self._tokenizer, self._ends, self._on_answer = tokenizer, set(ends), on_answer
        self._ids: list[list[int]] = []
        self._running: set[int] = set()

    def put(self, value: Tensor) -> None:  # (rows, length) the prompts, then (rows,) at every step
        """As generate calls it."""
        if value.dim() == 2:
            # The prompt's last token stays in front: alone, many tokenizers drop the space that an answer begins with.
            self._ids = [[last] for last in value[:, -1].tolist()]
            self._running = set(range(len(value)))
            return
        for row, token in enumerate(value.tolist()):
            if token in self._ends:
                self._running.discard(row)  # what follows is padding
            if row in self._running:
                self._ids[row].append(token)
                text = self._text(row)
                if not text.endswith("\ufffd"):  # the character's other bytes are still to come
                    self._on_answer(row, text)

    def end(self) -> None:
        """As generate calls it."""
        for row in range(len(self._ids)):
            self._on_answer(row, self._text(row))

    def _text(self, row: int) -> str:
        known, text = (
            self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self._ids[row][:1], self._ids[row])
        )
        return text[len(known) :]


@torch.no_grad()
def answers_together(
    model: PeftModel,  # in evaluation mode
    input_ids: list[int],  # any text
) -> bool:
    """Whether one batch gives the base's row and the adapter's what each gives alone: found by trying.

    PEFT hands `adapter_names` to some methods only; the layers of others never see it and adapt every row.
    """
    names = [_BASE, model.active_adapter]
    try:
        # Asked first, because a forward that raises leaves PEFT's hooks behind (no `finally` in LoraModel).
        for module in model.modules():
            if hasattr(module, "_check_forward_args"):
                module._check_forward_args(names, adapter_names=names)  # pyright: ignore[reportCallIssue]
        mixed = _last_logits(model, [input_ids] * 2, adapter_names=names)
    except (NotImplementedError, TypeError, ValueError):
        return False
    adapted = _last_logits(model, [input_ids])[0]
    with model.disable_adapter():
        base = _last_logits(model, [input_ids])[0]
    error = max(torch.dist(mixed[0], base), torch.dist(mixed[1], adapted))
    # Less than half of what lies between them: each row is nearer to its own. A method that ignores the names has all
    # of it, and so may one whose effect is smaller than the rounding.
    return bool(error < torch.dist(base, adapted) / 2)


def _last_logits(model: PeftModel, rows: list[list[int]], **more: Any) -> Tensor:  # (rows, vocabulary)
    return model(input_ids=torch.tensor(rows, device=device_of(model)), **more).logits[:, -1].float()
