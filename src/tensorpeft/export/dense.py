"""Adapter and base as one plain model, which needs neither PEFT nor bitsandbytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from tensorpeft.export.places import MODEL_NAME, check_folder
from tensorpeft.export.tokenizer import PROCESSOR_FILES, TOKENIZER_FILES, copy_processors, load_tokenizer
from tensorpeft.loading.adapters import base_of, load_adapter_config, put_adapter
from tensorpeft.loading.models import load_as_saved, pinned
from tensorpeft.loading.names import resolve
from tensorpeft.plugin.checkpoint import Source
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.quantization import dequantize
from tensorpeft.reports.folders import replace_files, sole_writer

# Of an earlier export.
_STALE = ("model*.safetensors*", "generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES)


def to_dense(
    adapter: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
    base: str | None = None,
) -> PreTrainedModel:
    """Merge a saved adapter into its base and write a model that plain transformers loads; with its tokenizer, and
    what prepares its images or sound.

    A base in 4 bits is dequantised first and the update added to the matrix: nothing is quantised again, which would
    ruin the update. The sum is made in the wider of the base's dtype and `dtype`, and cast at the end: a base in 32
    bits is in memory as it is, whatever `dtype` is.

    Args:
        adapter: folder of the saved adapter.
        out_dir: folder to write.
        dtype: of the whole model.
        base: name of the base model (`tensorpeft.loading.names.resolve`); None: what the adapter's configuration names.

    Raises:
        BlockingIOError: another process writes to `out_dir`.
        ValueError: the adapter names no base, or one that is gone, or does not belong to it; `out_dir` is the folder of
            one of them, or holds an adapter.
    """
    adapter = Path(adapter)
    check_folder(out_dir, MODEL_NAME, adapter, base)
    with sole_writer(Path(out_dir)):
        merged, tokenizer = merge(adapter, dtype, base)
        with replace_files(Path(out_dir), last=MODEL_NAME, stale=_STALE) as unfinished:
            merged.save_pretrained(unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
            copy_processors(adapter, base, unfinished)
        return merged


def merge(
    adapter: Path, dtype: torch.dtype, base: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A saved adapter in its base, and their tokenizer where there is one; arguments and errors are `to_dense`'s."""
    config = load_adapter_config(adapter)
    base = base or base_of(config, adapter)
    source = Source(str(adapter), {})
    tensors = source.read_shapes() or {}
    model = load_as_saved(base, config, tensors, dtype="auto")
    # The sum is rounded once: a base in 32 bits is not cast to 16 before the update is added.
    wide = torch.promote_types(model.dtype, dtype)
    if not source.is_of_residual_base():
        # Merging into a 4-bit layer would quantise the sum. An adapter that starts from its residual base needs the
        # layer as it is, and merges into a plain one by itself.
        model = dequantize(model, wide)
    into: Any = put_adapter(model, str(adapter), base).merge_and_unload
    merged: Any = dequantize(into(dtype=wide) if isinstance(config, TensorConfig) else into(), dtype)
    tokenizer = load_tokenizer(adapter)
    tokenizer = load_tokenizer(resolve(base), **pinned(config, base)) if tokenizer is None else tokenizer
    settings = merged.config.get_text_config()
    is_classifier = type(merged).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    if is_classifier and tokenizer is not None and settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id  # a decoder finds the last token of a text by it
    return merged, tokenizer
