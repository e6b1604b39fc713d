"""The tokenizer beside what is exported."""

from collections.abc import Iterable

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(sources: Iterable[str]) -> PreTrainedTokenizerBase | None:
    """The first tokenizer that is there; a model without one is complete too."""
    for source in sources:
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError):
            continue
        except Exception as error:  # tokenizers raises no class of its own
            raise ValueError(f"{source}: its tokenizer cannot be loaded: {error}") from error
    return None
