"""A folder of adapters, of which a server's clients know the names, as plain LoRA folders."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from tensorpeft.export import has_exact_lora, to_lora
from tensorpeft.export.whole_weights import refuse_trained_in_full, whole_weights
from tensorpeft.loading.adapters import load_adapter_config, load_on_skeleton
from tensorpeft.loading.architectures import class_name
from tensorpeft.loading.models import load_config
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.serving.cache import BoundedCache

# A name is no path: no separator, no hidden file, no parent folder, nothing that a file system has another view of.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FORMAT = 2  # of the folders; a change here makes all of them anew
_MERGE = "merge it into its base and serve that (tensorpeft export dense)"
_WHOLE = f"weights of its own, which no server takes: {_MERGE}."


class ServedAdapters:
    """Saved adapters of ours by name, expanded when they are asked for.

    Args:
        folder: its folders are the adapters, each called by its name.
        cache: for the expanded ones, under the digest of what they are made of.
        base_names: other names of the served model that adapters may have been trained on.
    """

    def __init__(self, folder: Path, cache: BoundedCache, base_names: Collection[str] = ()) -> None:
        self._folder, self._cache, self._base_names = folder.resolve(), cache, frozenset(base_names)

    def find(
        self,
        name: str,  # as a client wrote it
        base: str,  # folder or Hub name of the served model
    ) -> Path | None:
        """The folder of a plain LoRA that is exactly the adapter; None: there is no adapter of ours of that name.

        Of the base only the configuration is read. Messages name no path of this machine but that of the base.

        Raises:
            OSError: a file cannot be read, or there is no room.
            ValueError: the adapter is damaged, belongs to another base, or is no LoRA without an error.
        """
        if not _NAME.fullmatch(name):
            return None
        # A copy: what is looked at is what is expanded, whatever becomes of the files meanwhile.
        with TemporaryDirectory() as folder:
            try:
                return self._find(name, base, Path(folder))
            except ValueError as error:
                raise ValueError(str(error).replace(folder, f"adapter {name!r}")) from error

    def _find(self, name: str, base: str, copy: Path) -> Path | None:
        if not self._copy(name, CONFIG_NAME, copy):
            return None
        config = load_adapter_config(copy)
        if not isinstance(config, TensorConfig):
            return None
        self._check(name, config, base)
        if not self._copy(name, SAFETENSORS_WEIGHTS_NAME, copy):
            raise ValueError(f"adapter {name!r}: it has no {SAFETENSORS_WEIGHTS_NAME}. Save it again.")
        digest = hashlib.sha256()
        made_by = f"{_FORMAT} tensorpeft {version('tensorpeft')} peft {version('peft')}"
        texts = (made_by, base, load_config(base).to_json_string())
        for part in (*map(str.encode, texts), *((copy / file).read_bytes() for file in sorted(os.listdir(copy)))):
            digest.update(hashlib.sha256(part).digest())
        return self._cache.find_or_make(digest.hexdigest()[:32], lambda out: _expand(name, copy, base, out))

    def _copy(self, name: str, file: str, copy: Path) -> bool:
        """Copy a file of an adapter, unless there is none."""
        try:
            path = (self._folder / name / file).resolve()
        except RuntimeError as error:  # Python before 3.13, of links in a circle
            raise ValueError(f"adapter {name!r}: {file} is a link in a circle.") from error
        if not path.is_relative_to(self._folder):
            raise ValueError(f"adapter {name!r}: {file} is a link that leaves the folder of adapters. Copy the file.")
        if not path.is_file():
            return False
        (copy / file).write_bytes(path.read_bytes())
        return True

    def _check(self, name: str, config: PeftConfig, base: str) -> None:
        """Refuse what can be known without the weights."""
        found = config.base_model_name_or_path
        if not found:
            raise ValueError(
                f"adapter {name!r} does not say which base model it belongs to. Write its name into {CONFIG_NAME} "
                "(base_model_name_or_path)."
            )
        is_same_folder = os.path.isdir(found) and os.path.isdir(base) and os.path.samefile(found, base)
        if found not in {base, *self._base_names} and not is_same_folder:
            raise ValueError(
                f"adapter {name!r} was trained on {found}, but this server has {base}. Serve it with its own base; "
                f"if the two are one model, start the server with TENSORPEFT_BASE_NAMES={found}."
            )
        refuse_trained_in_full(config, _WHOLE, f"adapter {name!r}: ")
        _check_class(name, config, base)


def _check_class(name: str, config: PeftConfig, base: str) -> None:
    """Refuse an adapter whose layers an engine would look for in vain: it says nothing of it, and serves the base."""
    model = load_config(base)
    served, adapted = class_name(model, base), class_name(model, base, config)
    if adapted != served:
        raise ValueError(
            f"adapter {name!r} was trained on a {adapted}, but {base} is served as a {served}, whose layers have other "
            "names. Train it on that class."
        )


def _expand(name: str, copy: Path, base: str, out: Path) -> None:
    model = load_on_skeleton(copy, base)
    whole = whole_weights(model, "default", copy)
    refuse_trained_in_full(model.peft_config["default"], _WHOLE, f"adapter {name!r}: ", whole)
    if not has_exact_lora(model):
        method = str(getattr(model.peft_config["default"].peft_type, "value", ""))
        raise ValueError(
            f"adapter {name!r}: there is no exact LoRA of {method}, whose updates have a high rank or are not linear. "
            f"Cut it to a LoRA, which says how large the error is (tensorpeft export lora --rank), or {_MERGE}."
        )
    to_lora(model, out, base=base)
