"""How engines are started with what was exported."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig

from tensorpeft.export.llama_cpp import ARCHITECTURES
from tensorpeft.export.lora import SERVED_RANKS, ExportedLayer, trained_in_full
from tensorpeft.loading.architectures import class_name
from tensorpeft.loading.models import load_config, pinned
from tensorpeft.loading.names import resolve
from tensorpeft.quantization.quantizer import is_residual


def start_commands(
    layers: Sequence[ExportedLayer],
    lora: str | os.PathLike[str],  # folder that they were written to
    base: str | None = None,  # None: what its configuration names
    adapter: str | os.PathLike[str] = "ADAPTER",  # what they were made of
    rank: int | None = None,  # that, or
    energy: float | None = None,  # that, with which it was cut
) -> list[tuple[str, str]]:  # engine, command line or why there is none
    """How each engine is started with an exported adapter: those that know the model, and llama.cpp's form of it."""
    folder = Path(lora).absolute()
    config = PeftConfig.from_pretrained(str(folder))
    # Not where the adapter says: our own commands have to be told, too.
    moved = "" if base is None else f" --base {shlex.quote(base)}"
    base = base or config.base_model_name_or_path
    model_class, is_ours = _look_at(base, config)
    has_gguf = model_class in ARCHITECTURES
    pin = pinned(config, base or "")
    base = " --revision ".join(shlex.quote(word) for word in (resolve(base) if base else "BASE", *pin.values()))
    size = f" --rank {rank}" if rank is not None else f" --energy {energy}" if energy is not None else ""
    name, path, adapter = (shlex.quote(str(word)) for word in (folder.name, folder, adapter))
    max_rank = next(size for size in SERVED_RANKS if size >= max(layer.rank for layer in layers))
    peft = ("PEFT", f"PeftModel.from_pretrained(base, {str(folder)!r})")
    if is_ours:  # we alone load such a base
        return [peft]
    if in_full := trained_in_full(config):
        refused = (
            f"refuses {' and '.join(in_full)}: serve the merged model, tensorpeft export dense {adapter} OUT{moved}"
        )
        merged = f"tensorpeft export gguf {adapter} OUT.gguf --merged{moved}"
        return [peft, ("vLLM", refused), *[("llama.cpp", merged)] * has_gguf]
    return [
        peft,
        ("vLLM", f"vllm serve {base} --enable-lora --max-lora-rank {max_rank} --lora-modules {name}={path}"),
        ("SGLang", f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={path}"),
        *[("llama.cpp", f"tensorpeft export gguf {adapter} OUT.gguf{size}{moved}")] * has_gguf,
    ]


def _look_at(base: str | None, adapter: PeftConfig) -> tuple[str | None, bool]:
    """The name of the base's class, None if that is not known, and whether it is a residual base."""
    if base is None:
        return None, False
    try:
        model = load_config(base, **pinned(adapter, base))
        return class_name(model, base, adapter), is_residual(model)
    except ValueError:  # such as of a base that is no longer there
        return None, False
