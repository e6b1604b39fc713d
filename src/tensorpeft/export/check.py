"""What an exported adapter lost, on text: its loss and its tokens beside those of adapter and base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tensorpeft.export.text import Row, batches, read_rows, sample_rows
from tensorpeft.loading.adapters import base_of, load_adapter_config, load_model, put_adapter
from tensorpeft.loading.architectures import class_name
from tensorpeft.loading.models import load_config, pinned
from tensorpeft.quantization import dequantize, load_delta
from tensorpeft.quantization.delta import is_delta

_MAX_ROWS, _MAX_LENGTH, _BATCH_SIZE = 64, 256, 8


@dataclass(frozen=True)
class ExportCheck:
    """Means over the tokens of a text.

    Args:
        tokens: that were predicted.
        base: loss of the base model, in nats per token.
        adapter: of the adapter on it.
        export: of what was exported, on it.
        base_agreement: share of the tokens where the base's most probable one is the adapter's.
        export_agreement: the same of the export.
    """

    tokens: int
    base: float
    adapter: float
    export: float
    base_agreement: float
    export_agreement: float

    @property
    def kept(self) -> float | None:
        """The share of the adapter's gain over its base that the export has; None where there is no gain."""
        return (self.base - self.export) / (self.base - self.adapter) if self.adapter < self.base else None

    @property
    def is_worse_than_base(self) -> bool:
        """Whether one would do better to serve the base, on a text on which the adapter helps."""
        return self.kept is not None and self.kept < 0


class _Read:
    """What a model says of every token."""

    def __init__(self, model: nn.Module, rows: Sequence[Row]):
        device, total = next(model.parameters()).device, 0.0
        best = list[Tensor]()
        with torch.no_grad():
            for batch in batches(rows, _BATCH_SIZE):
                tokens, is_predicted = (tensor.to(device) for tensor in batch)
                is_predicted = is_predicted[:, 1:]
                logits = model(input_ids=tokens, use_cache=False).logits[:, :-1][is_predicted].float()
                total += F.cross_entropy(logits, tokens[:, 1:][is_predicted], reduction="sum").item()
                best.append(logits.argmax(-1).cpu())
        self.best = torch.cat(best)
        self.loss = total / len(self.best)

    def agrees(self, other: _Read) -> float:
        return (self.best == other.best).double().mean().item()


def is_measurable(
    adapter: str | os.PathLike[str],
    base: str | None = None,  # None: what the adapter's configuration names
) -> bool:
    """Whether the saved adapter's model says what token comes next.

    Raises:
        ValueError: the adapter names no base, or one that is gone.
    """
    config = load_adapter_config(adapter)
    base = base or base_of(config, adapter)
    name = class_name(load_config(base, **pinned(config, base)), base, config)
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def check_export(
    adapter: str | os.PathLike[str],
    export: str | os.PathLike[str],
    base: str | None = None,
    text: Path | None = None,
) -> ExportCheck:
    """Run base, adapter and what was exported from it on text.

    Args:
        adapter: folder of the saved adapter.
        export: folder of its export, a LoRA or a delta; one of a base in 4 bits is added to the dequantised base.
        base: name of the base model (`tensorpeft.loading.names.resolve`); None: what the adapter's configuration names.
        text: a text per line, or a .jsonl file of rows with "text", or with "prompt" and "response", whose response is
            looked at; of the first 64, up to 256 tokens each. None: 32 texts of 64 tokens that
            the adapter's model draws itself, on which it is better than its base.

    Raises:
        ValueError: the adapter names no base, or one that is gone, does not belong to it, or is no causal language
            model; there is no text in the file.
    """
    base = base or base_of(load_adapter_config(adapter), adapter)
    model: Any
    model, tokenizer = load_model(base, str(adapter), None)
    rows = sample_rows(model, tokenizer) if text is None else read_rows(text, tokenizer, _MAX_ROWS, _MAX_LENGTH)
    with model.disable_adapter():
        of_base = _Read(model, rows)
    of_adapter = _Read(model, rows)
    plain = model.unload()
    exported = load_delta(dequantize(plain), export) if is_delta(export) else put_adapter(plain, str(export), base)
    of_export = _Read(exported.eval(), rows)
    return ExportCheck(
        len(of_base.best),
        of_base.loss,
        of_adapter.loss,
        of_export.loss,
        of_base.agrees(of_adapter),
        of_export.agrees(of_adapter),
    )
