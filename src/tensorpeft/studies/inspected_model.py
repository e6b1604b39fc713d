"""Text to run a model on that is looked into, and short names for its layers."""

from pathlib import Path

from torch import Tensor

from tensorpeft.loading.models import load_tokenizer
from tensorpeft.loading.texts import first_lines
from tensorpeft.tasks.docstrings import load_docstrings

# Texts whose activations are looked at, and tokens of each.
_NUM_TEXTS, _MAX_TOKENS = 32, 128


def load_batch(
    model: str,  # as `tensorpeft.loading.names.resolve` takes it
    text: Path | None = None,  # a text per line; None: docstrings of Python's standard library
) -> dict[str, Tensor]:  # input_ids and attention_mask, each (texts, tokens)
    """The first texts as the model's tokenizer has them.

    Raises:
        ValueError: no text in the file.
    """
    tokenizer = load_tokenizer(model)
    if text is None:
        lines = [row.texts[0] for row in load_docstrings()["validation"][:_NUM_TEXTS]]
    else:
        lines = first_lines(text, _NUM_TEXTS)
    if not lines:
        raise ValueError(f"{text}: no line of text in it. Pass a file with a text per line.")
    batch = tokenizer(lines, truncation=True, max_length=_MAX_TOKENS, padding=True, return_tensors="pt")
    return {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}


def short_name(name: str) -> str:
    """The layer's number and the last two parts of its name."""
    number = next((part for part in name.split(".") if part.isdigit()), "")
    return f"{number}.{kind_of(name)}" if number else name


def kind_of(name: str) -> str:
    """The last two parts of its name, which layers of one kind have in common."""
    return ".".join(name.split(".")[-2:])
