"""What is read and written beside PEFT's own: a file checked before it is loaded, and a hint in the model card."""

from __future__ import annotations

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

LOADING_HINT = """
## How to load

This adapter uses a method of the package [tensorpeft](https://pypi.org/project/tensorpeft/), a plug-in to PEFT.
Install it (`pip install tensorpeft`) and import it before PEFT loads the adapter; without the import, PEFT raises a
bare `KeyError` that names the method.

```python
import tensorpeft  # registers the method with PEFT
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("<this adapter>")
```
"""


def check_file(folder: Path) -> None:
    """Refuse a local checkpoint whose weights cannot be loaded safely and in full.

    Raises:
        ValueError: the weights are a pickle, or a safetensors file that is truncated or not one at all.
    """
    safe, pickled = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if safe.exists():
        try:
            with safe_open(safe, framework="pt") as file:
                file.keys()
        except SafetensorError as error:
            raise ValueError(
                f"{safe}: not a complete safetensors file ({safe.stat().st_size} bytes; {error}). "
                "Download or save the adapter again."
            ) from error
    elif pickled.exists():
        raise ValueError(
            f"{pickled} is a pickle, which can run any code when it is loaded; expected {SAFETENSORS_WEIGHTS_NAME}. "
            "Save the adapter again with save_pretrained (safe_serialization=True, the default)."
        )


def add_loading_hint(folder: Path) -> None:
    """Append `LOADING_HINT` to the model card in `folder` or, for a named adapter's subfolder, the one above it."""
    for card in (folder / "README.md", folder.parent / "README.md"):
        if card.is_file() and "library_name: peft" in (text := card.read_text(encoding="utf-8")):
            if "## How to load" not in text:
                card.write_text(text.rstrip("\n") + "\n" + LOADING_HINT, encoding="utf-8")
            return
