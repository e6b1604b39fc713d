"""Texts as tokens: a prompt and what follows it, cut to what the model reads, padded to a batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenRow:
    """A prompt and its response as tokens.

    Args:
        ids: of both.
        start: index of the response's first token; at least 1, because nothing predicts a text's first token.
        cut: whether tokens were left out.
    """

    ids: list[int]
    start: int
    cut: bool = False

    @property
    def num_tokens(self) -> int:
        """How many tokens of the response are left."""
        return max(len(self.ids) - self.start, 0)


def base_model(model: nn.Module) -> Any:
    """The model without PEFT's wrapper; its adapters stay in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go."""
    return next(model.parameters()).device


def find_limit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,  # what is asked for
    reserved: int = 0,  # tokens that will follow
) -> int | None:
    """The most tokens that a row may have; None: there is no limit.

    Raises:
        ValueError: ``max_length`` is more than the model reads, or nothing is left of it.
    """
    config = base_model(model).config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa's positions are two more than what it reads; a tokenizer that knows no limit has 10^30, XLNet has -1.
    known = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None and 0 < limit < 10**9]
    if not known:
        return max_length
    limit = min(known) - reserved
    after = f" before {reserved} new ones" if reserved else ""
    if limit < 1:
        raise ValueError(
            f"max_new_tokens={reserved}: the model reads {min(known)} tokens, prompt included. Ask for fewer."
        )
    if max_length is not None and max_length > limit:
        raise ValueError(f"max_length={max_length}: the model reads at most {limit} tokens{after}. Ask for fewer.")
    return limit if max_length is None else max_length


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    limit: int | None,
) -> list[TokenRow]:
    """The prompts, of which the beginning is cut."""
    rows = [TokenRow(ids, len(ids)) for ids in _encode(tokenizer, prompts)]
    return [cut_start([row], limit, tokenizer)[0] for row in rows]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],  # of every prompt
) -> Iterator[list[TokenRow]]:
    """For every prompt, a row per response.

    Prompt and response are one text to the tokenizer, as in training, and may share a token. The response begins where
    the tokens part from those of the prompt alone; of several responses at the earliest such place, so that they are
    compared on the same text. This is TRL's rule.
    """
    texts = [prompt + response for prompt, group in zip(prompts, responses, strict=True) for response in group]
    together, alone = iter(_encode(tokenizer, texts)), _encode(tokenizer, prompts)
    for prompt, group in zip(alone, responses, strict=True):
        rows = [next(together) for _ in group]
        start = max(1, min(_common_prefix(prompt, row) for row in rows))
        yield [TokenRow(row, start) for row in rows]


def with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with the end-of-sequence token that training adds to it, as TRL does."""
    end = tokenizer.eos_token
    return text if not isinstance(end, str) or text.endswith(end) else text + end


def cut_end(row: TokenRow, limit: int | None) -> TokenRow:
    """The row without what is beyond the limit."""
    return row if limit is None or len(row.ids) <= limit else TokenRow(row.ids[:limit], row.start, cut=True)


def cut_start(
    rows: Sequence[TokenRow],  # of the same prompt
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[TokenRow]:
    """The rows without their prompt's beginning, all from the same token on; a token for the beginning stays.

    Raises:
        ValueError: a response alone is beyond the limit.
    """
    excess = 0 if limit is None else max(len(row.ids) for row in rows) - limit
    if excess <= 0:
        return list(rows)
    keep = int(rows[0].ids[0] == tokenizer.bos_token_id)
    if rows[0].start - excess < 1:
        longest = max(row.num_tokens for row in rows)
        raise ValueError(
            f"max_length={limit}: a response has {longest} tokens, and at least one of its prompt must be before it. "
            "Allow more, or take a model that reads more."
        )
    return [TokenRow(row.ids[:keep] + row.ids[keep + excess :], row.start - excess, cut=True) for row in rows]


def pad_batch(
    rows: Sequence[Mapping[str, list[int]]],  # input_ids, attention_mask, perhaps token_type_ids
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    left: bool = False,
) -> dict[str, Tensor]:  # each (rows, longest)
    """The model's arguments for rows of different lengths."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_id(tokenizer), "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}

    def column(name: str) -> Tensor:
        padded = []
        for row in rows:
            padding = [fill.get(name, 0)] * (width - len(row[name]))
            padded.append(padding + row[name] if left else row[name] + padding)
        return torch.tensor(padded, device=device)

    return {name: column(name) for name in rows[0]}


def pad_tokens(
    rows: Sequence[TokenRow],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    left: bool = False,
) -> dict[str, Tensor]:  # input_ids and attention_mask (rows, longest)
    """The model's arguments for prompts and responses."""
    masked = [{"input_ids": row.ids, "attention_mask": [1] * len(row.ids)} for row in rows]
    return pad_batch(masked, tokenizer, device, left)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with; padding is masked, so that any will do where the tokenizer has none."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return found if isinstance(found, int) else 0


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # Not verbose: what is too long is cut by us, and counted.
    return tokenizer(list(texts), verbose=False)["input_ids"] if texts else []  # pyright: ignore[reportReturnType]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length
