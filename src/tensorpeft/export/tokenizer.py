"""The tokenizer beside what is exported, and what prepares images and sound."""

import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

from tensorpeft.loading.adapters import load_adapter_config
from tensorpeft.loading.models import find_file, pinned
from tensorpeft.loading.names import resolve

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
# What prepares images and sound, and names the tokenizer beside it.
PROCESSOR_FILES = (IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME)


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


def copy_processors(
    adapter: Path,
    base: str | None,  # None: what the adapter's configuration names
    folder: Path,
) -> None:
    """Copy what prepares images and sound: the adapter's own or, if it has none, its base's."""
    config = load_adapter_config(adapter)
    base = base or config.base_model_name_or_path or ""
    found = [find_file(adapter, name) for name in PROCESSOR_FILES]
    if not any(found):
        found = [find_file(resolve(base), name, **pinned(config, base)) for name in PROCESSOR_FILES]
    for file in filter(None, found):
        shutil.copyfile(file, folder / file.name)
