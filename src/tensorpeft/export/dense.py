"""Adapter and base as one plain model, which needs neither PEFT nor bitsandbytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from tensorpeft.quantization import dequantize

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def to_dense(
    adapter: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
    base: str | None = None,
) -> PreTrainedModel:
    """Merge a saved adapter into its base and write a model that plain transformers loads; with its tokenizer.

    A base in 4 bits is dequantised first and the update added to the matrix: nothing is quantised again, which would
    ruin the update.

    Args:
        adapter: folder of the saved adapter.
        out_dir: folder to write.
        dtype: of the whole model.
        base: folder or Hub name of the base model; None: what the adapter's configuration names.

    Raises:
        ValueError: the adapter names no base, or does not belong to it.
    """
    adapter = Path(adapter)
    config = PeftConfig.from_pretrained(str(adapter))
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter}: its configuration names no base model. Pass it (--base).")
    model = PeftModel.from_pretrained(_load_base(base, config.task_type, adapter), str(adapter))
    # Ours takes the dtype, so that a residual base is rounded once; a method of PEFT's merges in the base's own.
    merge: Any = model.merge_and_unload
    merged = merge(dtype=dtype) if hasattr(config, "registered_type") else merge()
    merged = dequantize(merged, dtype)
    merged.save_pretrained(out_dir)  # type: ignore
    for source in (adapter, Path(base)):
        if (source / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(source).save_pretrained(out_dir)
            break
    return merged  # type: ignore


def _load_base(base: str, task_type: Any, adapter: Path) -> PreTrainedModel:
    name = _CLASSES.get(str(getattr(task_type, "value", task_type)))
    if name is None:
        name = (AutoConfig.from_pretrained(base).architectures or ["AutoModel"])[0]
    more = {} if (labels := _num_labels(adapter)) is None else {"num_labels": labels}
    return getattr(transformers, name).from_pretrained(base, dtype="auto", **more)


def _num_labels(adapter: Path) -> int | None:
    """The size of the classification head that was trained beside the adapter, if there is one."""
    with safe_open(adapter / SAFETENSORS_WEIGHTS_NAME, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118  # not a dictionary
            if key.endswith(("classifier.weight", "score.weight", "classifier.out_proj.weight")):
                return opened.get_slice(key).get_shape()[0]
    return None
