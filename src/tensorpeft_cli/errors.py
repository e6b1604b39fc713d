"""What a person is told of an error; an error that is a bug is told of by its traceback."""

import argparse
from collections.abc import Iterator
from pathlib import Path

_EXTRAS = {"bitsandbytes": "4bit", "lm_eval": "eval", "ray": "ray"}
# What talks to the Hub, and raises.
_HUB = {"huggingface_hub", "httpx", "httpcore", "requests"}


def explain(error: Exception, arguments: argparse.Namespace) -> str | None:
    """The message of a user error: what is wrong, and what to do. None: it is no user error."""
    if isinstance(error, ModuleNotFoundError):
        if str(error.name).partition(".")[0] == "tensorpeft":
            return None
        extra = _EXTRAS.get(str(error.name), arguments.extra)
        return f'{error}. This command needs more libraries than the package. Run: pip install "tensorpeft[{extra}]"'
    if not isinstance(error, ValueError | ImportError | OSError):
        return None
    # What is ours says what to do; what the Hub's library says, which knows nothing of folders, does not.
    is_said = "Pass " in str(error) or not any(_is_from_the_hub(link) for link in _chain(error))
    return str(error) if is_said else _of_the_hub(error, arguments)


def _of_the_hub(error: Exception, arguments: argparse.Namespace) -> str:
    """Nearly always a folder's name that is misspelt, which was then looked for on the Hub; the Hub does not say so."""
    given = [str(getattr(arguments, name, None) or "") for name in ("model", "adapter", "base")]
    absent = [name for name in given if name and not Path(name).exists()]
    message = " ".join(str(error).split()).partition(" Check your internet connection")[0].rstrip(".")
    if absent and "no folder" not in message:
        message = f"{absent[0]}: no folder of that name, and not to be had from the Hub ({message})"
    return (
        f"{message}. Pass a folder of this machine, or a name that https://huggingface.co has; without a network, or "
        "with HF_HUB_OFFLINE=1, only what was downloaded before is found."
    )


def _is_from_the_hub(error: BaseException) -> bool:
    return any(cls.__module__.partition(".")[0] in _HUB for cls in type(error).__mro__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
