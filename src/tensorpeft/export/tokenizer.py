"""The tokenizer beside what is exported."""

import os
from collections.abc import Iterable

from transformers import AutoTokenizer


def copy_tokenizer(sources: Iterable[str], out_dir: str | os.PathLike[str]) -> None:
    """The first tokenizer that is there; a model without one is complete too."""
    for source in sources:
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(out_dir)
            return
        except (OSError, ValueError, KeyError):
            continue
        except Exception as error:  # tokenizers raises no class of its own
            raise ValueError(f"{source}: its tokenizer cannot be loaded: {error}") from error
