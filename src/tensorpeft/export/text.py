"""Text to try an exported adapter on: a person's, or the model's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tensorpeft.loading.texts import first_lines

_OWN_TEXTS, _OWN_TOKENS = 32, 64
_EXPECTED = "Expected a text per line, or a .jsonl file of rows with text, or with prompt and response."


class Row(NamedTuple):
    """A text as tokens, of which those from `start` on, at least one, are predicted."""

    tokens: Tensor  # (tokens,)
    start: int


def read_rows(
    file: Path,  # a text per line; or .jsonl: "text", or "prompt" and "response", of which the response is predicted
    tokenizer: PreTrainedTokenizerBase,
    max_rows: int,
    max_length: int,
) -> list[Row]:
    """The first texts as tokens.

    Raises:
        ValueError: no such text, none with a token to predict, or a file in another form.
    """
    try:
        lines = first_lines(file, max_rows)
        texts = [_parts(json.loads(line)) if file.suffix == ".jsonl" else ("", line) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}. {_EXPECTED}") from None
    rows = list[Row]()
    for prompt, text in texts:
        start = len(tokenizer(prompt).input_ids) if prompt else 0
        ids = tokenizer(prompt + text, truncation=True, max_length=max_length).input_ids
        rows.append(Row(torch.tensor(ids), max(start, 1)))
    if not (rows := [row for row in rows if len(row.tokens) > row.start]):
        raise ValueError(f"{file}: no text with a token to predict in it. {_EXPECTED}")
    return rows


def _parts(row: Any) -> tuple[str, str]:
    """Prompt, and what is predicted."""
    parts = ("", row["text"]) if "text" in row else (row["prompt"], row["response"])
    if not all(isinstance(part, str) for part in parts):
        raise TypeError(f"a row with {parts}")
    return parts


@torch.no_grad()
def sample_rows(
    model: Any,  # a causal language model of transformers, or one of PEFT
    tokenizer: PreTrainedTokenizerBase,
) -> list[Row]:
    """Texts that the model draws from its own distribution, the same in every call."""
    first = next(token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if isinstance(token, int))
    device = next(model.parameters()).device
    # All said: a model's own settings, which are a chat's, fill in the rest.
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=_OWN_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends).view(-1)
    start = torch.full((_OWN_TEXTS, 1), first, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        drawn = model.generate(input_ids=start, attention_mask=torch.ones_like(start), generation_config=settings)
    rows = list[Row]()
    for row in drawn.cpu():
        ended = torch.isin(row[1:], ends).long().cumsum(0)  # what stands behind an end was not drawn
        rows.append(Row(row[: 1 + int((ended == 0).sum()) + int(ended.any())], 1))
    return rows


def batches(rows: Sequence[Row], size: int) -> list[tuple[Tensor, Tensor]]:  # each (rows, tokens)
    """The rows side by side, padded: their tokens, and which of them are predicted."""
    result = list[tuple[Tensor, Tensor]]()
    for k in range(0, len(rows), size):
        some = rows[k : k + size]
        tokens = nn.utils.rnn.pad_sequence([row.tokens for row in some], batch_first=True)
        places = torch.arange(tokens.shape[1])
        starts, ends = (torch.tensor(ends)[:, None] for ends in zip(*((row.start, len(row.tokens)) for row in some)))
        result.append((tokens, (places >= starts) & (places < ends)))
    return result
