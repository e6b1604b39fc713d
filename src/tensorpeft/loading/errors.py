"""What is wrong with the name of a model, said once for all commands."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from tensorpeft.loading.sizes import check_sizes


@contextmanager
def explained(
    name: str | os.PathLike[str],  # folder or Hub name of what is loaded within
) -> Iterator[None]:
    """Errors of files and of the Hub as one ValueError, which says what was looked for and what to do.

    What a library makes of a damaged or foreign file, which may be any error, is one, too.
    """
    try:
        yield
    except (OSError, HFValidationError, SafetensorError) as error:
        raise ValueError(_explain(os.fspath(name), str(error).strip().partition("\n")[0])) from error
    except (ValueError, ImportError, MemoryError, AssertionError, Warning):
        raise
    except Exception as error:
        raise ValueError(f"{os.fspath(name)}: it cannot be loaded: {type(error).__name__}: {error}") from error


def require_config(folder: Path) -> None:
    """Refuse a folder that holds no model.

    Raises:
        ValueError: there is no config.json in it, or one that no model has.
    """
    file = folder / "config.json"
    if folder.is_dir() and not file.is_file():
        raise ValueError(
            f"{folder}: no config.json in this folder, and not one .gguf file. Pass the folder of a transformers model."
        )
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file}: expected a model's configuration, a mapping of fields.")
        check_sizes(found, str(folder))


def _explain(name: str, reason: str) -> str:
    if Path(name).is_dir():
        return f"{name}: this folder cannot be loaded: {reason}"
    if Path(name).is_file():
        return f"{name}: a file. Pass a folder of a transformers model, a .gguf file, or a Hub name (OWNER/NAME)."
    try:
        validate_repo_id(name)
    except HFValidationError:
        return f"{name}: no folder of that name. Pass that of a transformers model, a .gguf file, or OWNER/NAME (Hub)."
    if is_offline_mode():
        return (
            f"{name}: no folder of that name, and no such model was downloaded from the Hub before, which is not asked "
            "while HF_HUB_OFFLINE is set. Pass a path, or unset it."
        )
    return (
        f"{name}: no folder of that name, and not to be had from the Hub: {reason} Pass a path, or see that the Hub "
        "has that name and can be reached; private models need: hf auth login."
    )
