"""What is read and written beside PEFT's own: a file checked before it is loaded, and a hint in the model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensorpeft.networks.update import BASE_DIGEST

_LOADING_HINT = """
> This adapter uses a method of the package [tensorpeft](https://pypi.org/project/tensorpeft/), a plug-in to PEFT.
> Install it (`pip install tensorpeft`), and import it before PEFT loads the adapter: without the import, PEFT raises a
> bare `KeyError` that names the method. (`tensorpeft enable-autoload` does so for a whole environment.)
>
> ```python
> import tensorpeft  # registers the method with PEFT
> from peft import AutoPeftModel
>
> model = AutoPeftModel.from_pretrained("<this adapter>")
> ```
"""


@dataclass(frozen=True)
class Source:
    """Where an adapter is loaded from.

    Args:
        model_id: a folder, or a name on the Hub.
        download: of `hf_hub_download`.
        verifies_base: whether the digests of a base that holds an update's start itself are made again.
        ignores_sizes: whether PEFT is asked to pass over tensors of other sizes, which is refused.
        renames: PEFT's ``key_mapping``: patterns in names of the base model, and what they are replaced by.
    """

    model_id: str
    download: Mapping[str, Any]
    verifies_base: bool = True
    ignores_sizes: bool = False
    renames: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the files are, if it is a folder."""
        return Path(self.model_id, self.download.get("subfolder") or "")

    def read_shapes(self) -> dict[str, Tensor] | None:
        """The checkpoint's tensors on the meta device, all float32; None if there is no file to be had: as PEFT says.

        Raises:
            ValueError: the weights are a pickle, or a safetensors file that is truncated, empty or not one at all; or
                tensors of other sizes are to be passed over.
        """
        if self.ignores_sizes:
            raise ValueError(
                "ignore_mismatched_sizes=True would leave tensors at random where the checkpoint has others. Load the "
                "adapter on a model with as many tokens or labels as the one it was trained on; change that afterwards."
            )
        safe, pickled = self.folder / SAFETENSORS_WEIGHTS_NAME, self.folder / WEIGHTS_NAME
        if not self.folder.is_dir():
            safe = self._download()
        elif not os.path.lexists(safe) and not os.path.lexists(pickled):
            raise ValueError(f"{safe}: there is no such file. Download or save the adapter again.")
        elif not os.path.lexists(safe):
            raise ValueError(
                f"{pickled} is a pickle, which can run any code when it is loaded; expected "
                f"{SAFETENSORS_WEIGHTS_NAME}. Save the adapter again with save_pretrained (safe_serialization=True, "
                "the default)."
            )
        return None if safe is None else {self._renamed(key): tensor for key, tensor in _read_shapes(safe).items()}

    def _renamed(self, key: str) -> str:
        """As `peft.utils.load_peft_weights` renames it."""
        prefix = next((prefix for prefix in ("base_model.model.", "base_model.") if key.startswith(prefix)), "")
        name = key.removeprefix(prefix)
        others = (re.subn(pattern, replacement, name) for pattern, replacement in self.renames.items())
        return prefix + next((other for other, count in others if count), name)

    def is_of_residual_base(self) -> bool:
        """Whether its updates start from what the base's layers hold themselves; raises as `read_shapes`."""
        return any(key.endswith(f".{BASE_DIGEST}") for key in self.read_shapes() or ())

    def _download(self) -> Path | None:
        """The file that PEFT is going to download, where it will look for it."""
        download = dict(self.download)
        subfolder = download.pop("subfolder", None)
        name = SAFETENSORS_WEIGHTS_NAME if subfolder is None else f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}"
        try:
            return Path(hf_hub_download(self.model_id, name, **download))
        except (OSError, HFValidationError):
            return None


def _read_shapes(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a link to no file"
        raise ValueError(f"{path}: {kind}, expected a safetensors file. Download or save the adapter again.")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # no dictionary
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({path.stat().st_size} bytes; {error}). "
            "Download or save the adapter again."
        ) from error
    if not shapes:
        raise ValueError(f"{path}: there is no tensor in this file. Download or save the adapter again.")
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def check_config_file(folder: Path) -> None:
    """Raise a `ValueError` if a folder's adapter_config.json, where there is one, is not that of a PEFT method."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}). Download or save the adapter again.") from error
    method = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{path}: peft_type={method!r}: expected the name of a method of PEFT, or of a package that is imported, "
            "such as LORA. Download or save the adapter again."
        )


# What is being loaded: PEFT tells the tuner, which builds the adapter, nothing of the file.
_source: ContextVar[Source | None] = ContextVar("source", default=None)


@contextmanager
def loading_from(source: Source | None) -> Iterator[None]:
    """An adapter that is built inside is one of this checkpoint."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def reads_files() -> bool:
    """Whether what is being loaded comes from files, not from memory."""
    return _source.get() is not None


def download_options() -> dict[str, Any]:
    """Of `hf_hub_download`, for a file of another repository than that which is being loaded."""
    source = _source.get()
    given: Mapping[str, Any] = {} if source is None else source.download
    return {key: value for key, value in given.items() if key in ("token", "cache_dir", "local_files_only")}


def verifies_base() -> bool:
    """Whether what is being loaded is compared with the base's own digest made anew."""
    source = _source.get()
    return source is None or source.verifies_base


def shapes_to_load() -> dict[str, Tensor] | None:
    """The tensors of the checkpoint that an adapter is being built for; None if for none.

    Raises:
        ValueError: see `Source.read_shapes`.
    """
    source = _source.get()
    return None if source is None else source.read_shapes()


def add_loading_hint(
    file: Path,  # the card
    methods: Sequence[str],  # of its adapters
) -> None:
    """Tag a model card, and tell its readers at its top to `import tensorpeft`."""
    card = ModelCard.load(file)
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or ()), "tensorpeft", *methods]))
    if _LOADING_HINT not in card.content:
        card.text = f"{_LOADING_HINT}\n{card.text.lstrip()}"
    card.save(file)
