"""How engines are started with what was exported."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peft import PeftConfig

from tensorpeft.export.llama_cpp import ARCHITECTURES
from tensorpeft.export.lora import SERVED_RANKS, ExportedLayer
from tensorpeft.export.whole_weights import trained_in_full
from tensorpeft.loading.architectures import class_name, writes_text
from tensorpeft.loading.models import load_config, pinned
from tensorpeft.loading.names import resolve
from tensorpeft.plugin.checkpoint import Source
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
    found = _look_at(base, config)
    # Every class that llama.cpp knows calls its head so.
    is_in_embedding = found.is_tied and any(layer.name == "lm_head" for layer in layers)
    has_gguf = found.adapted in ARCHITECTURES
    pin = pinned(config, base or "")
    base = " --revision ".join(shlex.quote(word) for word in (resolve(base) if base else "BASE", *pin.values()))
    size = f" --rank {rank}" if rank is not None else f" --energy {energy}" if energy is not None else ""
    name, path, adapter = (shlex.quote(str(word)) for word in (folder.name, folder, adapter))
    max_rank = next(size for size in SERVED_RANKS if size >= max(layer.rank for layer in layers))
    peft = ("PEFT", f"PeftModel.from_pretrained(base, {str(folder)!r})")
    if found.is_residual:  # we alone load such a base
        return [peft]
    keys = [key for key in Source(str(folder), {}).read_shapes() or () if ".lora_" not in key]
    merged = f"serve the merged model, tensorpeft export dense {adapter} OUT{moved}"
    in_gguf = f"tensorpeft export gguf {adapter} OUT.gguf --merged{moved}"
    alone_in_gguf = f"tensorpeft export gguf {adapter} OUT.gguf{size}{moved}"
    if in_full := trained_in_full(config, keys):
        return [peft, ("vLLM", f"refuses {' and '.join(in_full)}: {merged}"), *[("llama.cpp", in_gguf)] * has_gguf]
    if found.adapted != found.served:
        return [peft, ("vLLM", f"serves a {found.served}, whose layers a {found.adapted}'s adapter does not fit")]
    if not found.writes_text:
        return [peft, ("vLLM", f"adds no LoRA to a {found.served}, which is no decoder that writes text: {merged}")]
    return [
        peft,
        ("vLLM", f"vllm serve {base} --enable-lora --max-lora-rank {max_rank} --lora-modules {name}={path}"),
        ("SGLang", f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={path}"),
        *[("llama.cpp", in_gguf if is_in_embedding else alone_in_gguf)] * has_gguf,
    ]


class _Base(NamedTuple):
    """What is known of a base; None: the name of a class that is not."""

    served: str | None = None  # class that engines make of it
    adapted: str | None = None  # class that was adapted
    writes_text: bool = True  # the former, and has nothing but a decoder
    is_residual: bool = False
    is_tied: bool = False  # whether its head is its embedding


def _look_at(base: str | None, adapter: PeftConfig) -> _Base:
    if base is None:
        return _Base()
    try:
        model = load_config(base, **pinned(adapter, base))
        served, adapted = class_name(model, base), class_name(model, base, adapter)
    except ValueError:  # such as of a base that is no longer there
        return _Base()
    is_tied = bool(getattr(model, "tie_word_embeddings", False))
    return _Base(served, adapted, writes_text(model, served), is_residual(model), is_tied)
