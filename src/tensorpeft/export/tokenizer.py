"""The tokenizer beside what is exported."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

# Patterns of all that `save_pretrained` writes of one.
TOKENIZER_FILES = (
    "tokenizer.*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece.*",
)


def load_tokenizer(
    source: str | os.PathLike[str],  # folder, or Hub name
    **arguments: str,  # of from_pretrained
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of an adapter or a model; None: it has none, and is complete without.

    Raises:
        ValueError: it has one that cannot be loaded.
    """
    folder = Path(source)
    is_there = any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)
    if folder.is_dir() and not is_there:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, **arguments)
    except Exception as error:  # tokenizers raises no class of its own
        if not is_there and isinstance(error, (OSError, ValueError, KeyError)):  # nothing to be had of the Hub
            return None
        raise ValueError(
            f"{source}: its tokenizer cannot be loaded: {error}. Save it again, or remove its files."
        ) from error
