"""Adapter and base as one plain model, which needs neither PEFT nor bitsandbytes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from tensorpeft.networks.update import BASE_DIGEST
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.quantization import dequantize

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
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
    names = _tensor_shapes(adapter)
    model = _load_base(base, config, names)
    if not any(name.endswith(BASE_DIGEST) for name in names):
        # Merging into a 4-bit layer would quantise the sum. An adapter that starts from its residual base needs the
        # layer as it is, and merges into a plain one by itself.
        model = dequantize(model, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            adapted = PeftModel.from_pretrained(model, str(adapter))
        except UserWarning as error:
            raise ValueError(
                f"{adapter}: not all of its layers are in {type(model).__name__} of {base}. Pass the base that it was "
                "trained on (--base)."
            ) from error
    merge: Any = adapted.merge_and_unload
    merged = dequantize(merge(dtype=dtype) if isinstance(config, TensorConfig) else merge(), dtype)
    merged.save_pretrained(out_dir)  # type: ignore
    _copy_tokenizer((str(adapter), base), out_dir)
    return merged  # type: ignore


def _load_base(base: str, config: PeftConfig, names: Mapping[str, Sequence[int]]) -> PreTrainedModel:
    """The base as the class that was adapted."""
    task = str(getattr(config.task_type, "value", config.task_type))
    mapping = config.auto_mapping or {}
    name = _CLASSES.get(task) or mapping.get("base_model_class")
    if name is None:
        name = (AutoConfig.from_pretrained(base).architectures or ["AutoModel"])[0]
    model_cls = getattr(transformers, name, None)
    if model_cls is None:
        raise ValueError(f"{base}: transformers has no class {name!r}. Merge it in Python: model.merge_and_unload().")
    heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    labels = next((shape[0] for name, shape in names.items() if name.endswith(heads)), None)
    return model_cls.from_pretrained(base, dtype="auto", **({} if labels is None else {"num_labels": labels}))


def _tensor_shapes(adapter: Path) -> dict[str, Sequence[int]]:
    with safe_open(adapter / SAFETENSORS_WEIGHTS_NAME, framework="pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  # not a dictionary


def _copy_tokenizer(sources: Iterable[str], out_dir: str | os.PathLike[str]) -> None:
    """The first tokenizer that is there; a model without one is complete too."""
    for source in sources:
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(out_dir)
            return
        except (OSError, ValueError, KeyError):
            continue
