"""Where an export may be written: over nothing that it is made of, and not where two things would be taken for one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME

from tensorpeft.loading.adapters import load_adapter_config
from tensorpeft.quantization.delta import CONFIG_NAME as DELTA_NAME

MODEL_NAME = "config.json"
# What a form replaces, by the file that says what a folder has.
_REPLACED = {CONFIG_NAME: "an adapter (LORA)", MODEL_NAME: "a model", DELTA_NAME: "a delta"}
_Path = str | os.PathLike[str]


def check_folder(
    out_dir: _Path,
    last: str,  # the export's own configuration file
    model_or_path: PeftModel | _Path,  # what is exported, or its folder
    base: str | None,  # None: what the adapter's configuration names
) -> None:
    """Refuse a folder in which the export would replace, or be mixed with, what is no earlier export of its form.

    transformers loads an adapter that lies beside a model together with it.

    Raises:
        ValueError: it is the adapter's or the base's, or holds another form, or an adapter that is no plain LoRA.
    """
    if isinstance(model_or_path, (str, os.PathLike)):
        sources = {model_or_path, base or load_adapter_config(model_or_path).base_model_name_or_path}
    else:
        sources = {config.base_model_name_or_path for config in model_or_path.peft_config.values()}
    kinds = {**_REPLACED, CONFIG_NAME: f"an adapter ({_method_of(Path(out_dir))})"}
    held = {name: kind for name, kind in kinds.items() if Path(out_dir, name).is_file()}
    others = [kind for name, kind in held.items() if (name, kind) != (last, _REPLACED[last])]
    if others or _is_one_of(out_dir, sources):
        raise ValueError(
            f"{os.fspath(out_dir)} holds {next(iter(others or held.values()), 'what is exported')}, which would be "
            "written over, or taken for one with the export. Name another folder, or remove it first."
        )


def check_file(out_file: _Path, base: str | None) -> None:
    """Refuse to write over a base that is a file.

    Raises:
        ValueError: it is that file.
    """
    if _is_one_of(out_file, [base]):
        raise ValueError(f"{os.fspath(out_file)} is the base, which would be written over. Name another file.")


def _is_one_of(out: _Path, sources: Iterable[_Path | None]) -> bool:
    there = [source for source in sources if source and os.path.exists(source) and os.path.exists(out)]
    return any(os.path.samefile(source, out) for source in there)


def _method_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except (AttributeError, OSError, ValueError):
        return None
