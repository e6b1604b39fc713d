"""What a person is told of an error; an error that is a bug is told of by its traceback."""

import argparse
import errno
import re
from collections.abc import Iterator

_EXTRAS = {"bitsandbytes": "4bit", "lm_eval": "eval", "ray": "ray"}
# What libraries raise where memory ends, in classes of their own or RuntimeErrors.
_NO_MEMORY = ("can't allocate memory", "out of memory", "invalid buffer size")
# What they raise where a file cannot be written or read: of safetensors, and of torch.save on a full disk.
_OF_FILES = ("SafetensorError", "inline_container.cc", "PytorchStreamWriter failed")
# What talks to the Hub, and raises.
_HUB = {"huggingface_hub", "httpx", "httpcore", "requests"}


def explain(error: Exception, arguments: argparse.Namespace) -> str | None:
    """The message of a user error: what is wrong, and what to do. None: it is no user error."""
    if isinstance(error, ModuleNotFoundError):
        if str(error.name).partition(".")[0] == "tensorpeft":
            return None
        extra = _EXTRAS.get(str(error.name), arguments.extra)
        return f'{error}. This command needs more libraries than the package. Run: pip install "tensorpeft[{extra}]"'
    if isinstance(error, re.error):
        return f"{error.pattern!r}: no regular expression: {error}. A layer's name or its ending needs none."
    if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
        return f"the memory does not suffice: {error}. Take smaller batches, lengths or ranks, or a smaller model."
    if not isinstance(error, ValueError | ImportError | OSError):
        if not any(map(_is_of_the_disk, _chain(error))):
            return None
        return f"a file cannot be read or written: {error}. See that the disk is not full, and the file not damaged."
    message = str(error).strip()
    # What is ours says what to do; the Hub's libraries, which know nothing of folders, do not.
    if "Pass " in message or not any(map(_is_from_the_hub, _chain(error))):
        return message
    return (
        f"{message.rstrip('.')}. Pass a folder or file of this machine, or a name that https://huggingface.co has; "
        "without a network, or with HF_HUB_OFFLINE=1, only what was downloaded before is found."
    )


def _is_of_the_disk(error: BaseException) -> bool:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_full or any(text in f"{type(error).__name__}: {error}" for text in _OF_FILES)


def _is_from_the_hub(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) or any(
        cls.__module__.partition(".")[0] in _HUB for cls in type(error).__mro__
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
