"""An adapter as a plain LoRA checkpoint: the form that PEFT, vLLM, SGLang and llama.cpp all read."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from tensorpeft.loading.adapters import load_on_skeleton
from tensorpeft.networks.update import AbstractFactoredUpdate, AbstractUpdate
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.layer import TensorLayer, check_weight_update
from tensorpeft.reports.folders import replace_files, sole_writer

# vLLM compiles its kernels for these ranks.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an exported adapter.

    Args:
        name: full name of the layer in the model.
        rank: of its update before padding.
        error: ‖ΔW − B A‖ / ‖ΔW‖ in the Frobenius norm; zero where the update is a low-rank matrix product.
    """

    name: str
    rank: int
    error: float


@torch.no_grad()
def to_lora(
    model_or_path: PeftModel | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    rank: int | None = None,
    adapter_name: str | None = None,
    progress: bool = False,
) -> list[ExportedLayer]:
    """Write an adapter of any of our methods as a LoRA that needs nothing of ours to be loaded.

    LoRTA, LoTR, FacT, LoRETTA (rep), FLoRA and NOLA have two thin factors per layer: the export is exact, without an
    SVD. Shared factors are written out per layer, so that the file is as large as a LoRA's. The updates of DoTA and
    QuanTA have a high rank: they are cut to `rank` by a truncated SVD, and the error of every layer is returned. All
    layers get one rank, padded with zeros to one that vLLM has kernels for (8, 16, 32, 64, 128, 256, 320, 512); the
    scale is folded in (`lora_alpha = r`).

    Args:
        model_or_path: a PeftModel with an adapter of ours, or the folder of a saved one; of that, the base model is
            only read as a configuration.
        out_dir: folder for adapter_config.json and adapter_model.safetensors; made where it does not exist.
        rank: what an update of high rank is cut to; must not be given for the others.
        adapter_name: which adapter; None: the active one.
        progress: whether to show a progress bar, which an SVD of many layers needs.

    Returns:
        The layers, in the model's order.

    Raises:
        BlockingIOError: another process writes to `out_dir`.
        ValueError: no adapter of ours in the model, one that is not linear, a convolution that PEFT's LoRA does not
            match (groups, dilation, padding mode), a rank missing, unneeded, or above 512.

    >>> to_lora("runs/my-lorta", "runs/my-lora")  # doctest: +SKIP
    """
    with sole_writer(Path(out_dir)):
        return _write_lora(model_or_path, Path(out_dir), rank, adapter_name, progress)


def _write_lora(
    model_or_path: PeftModel | str | os.PathLike[str],
    out_dir: Path,
    rank: int | None,
    adapter_name: str | None,
    progress: bool,
) -> list[ExportedLayer]:
    model = load_on_skeleton(model_or_path) if isinstance(model_or_path, (str, os.PathLike)) else model_or_path
    name = adapter_name or _active_adapter(model)
    layers = {key: module for key, module in model.get_base_model().named_modules() if isinstance(module, TensorLayer)}
    layers = {key: layer for key, layer in layers.items() if name in layer.updates}
    if not layers:
        raise ValueError(
            f"no layer has an adapter {name!r} of tensorpeft; loaded are {sorted(model.peft_config)}. Pass a PeftModel "
            "or a folder with one, and the adapter's name."
        )
    updates: dict[str, AbstractUpdate] = {key: layer.updates[name] for key, layer in layers.items()}  # type: ignore[misc]
    for update in updates.values():
        check_weight_update(name, update)
    _check_rank(updates, rank)
    for key, layer in layers.items():
        _check_geometry(key, layer.get_base_layer())
    tensors: dict[str, Tensor] = {}
    exported = []
    for key, update in tqdm(updates.items(), "Exporting", disable=not progress):
        down, up, error = _two_factors(update, rank)
        exported.append(ExportedLayer(key, len(down), error))
        kernel = getattr(layers[key].get_base_layer(), "kernel_size", ())
        tensors[f"{key}.lora_A.weight"] = down.unflatten(1, (-1, *kernel)) if kernel else down
        tensors[f"{key}.lora_B.weight"] = up[(..., *(None for _ in kernel))]
    padded = next(size for size in RANKS if size >= max(layer.rank for layer in exported))
    tensors = {f"base_model.model.{key}": _pad(tensor, key, padded) for key, tensor in tensors.items()}
    prefix = next(iter(layers.values())).adapter_layer_names[0]
    others = {k: v for k, v in get_peft_model_state_dict(model, adapter_name=name).items() if f".{prefix}." not in k}
    _save(out_dir, tensors | others, _config(model, name, layers, padded))
    return exported


def _active_adapter(model: PeftModel) -> str:
    if len(model.active_adapters) != 1:
        raise ValueError(f"{len(model.active_adapters)} adapters are active: say which to export, adapter_name=...")
    return model.active_adapters[0]


def _check_rank(updates: dict[str, AbstractUpdate], rank: int | None) -> None:
    """Raise a `ValueError` unless a rank is given exactly where there is something to cut."""
    high = [key for key, update in updates.items() if not isinstance(update, AbstractFactoredUpdate)]
    if high and rank is None:
        raise ValueError(
            f"{high[0]}: its update has a high rank, so that a LoRA of it has an error. Pass the rank to cut it to, "
            f"one of {', '.join(map(str, RANKS))}, or merge the adapter instead (merge_and_unload)."
        )
    if not high and rank is not None:
        raise ValueError(f"rank={rank}: this adapter has low rank and is exported exactly. Leave rank out.")
    largest = rank or max(len(update.factors().down) for update in updates.values())  # type: ignore[attr-defined]
    if not 1 <= largest <= RANKS[-1]:
        raise ValueError(f"rank {largest}: expected 1 to {RANKS[-1]}, the largest that LoRA servers have kernels for.")


def _check_geometry(key: str, base: nn.Module) -> None:
    """Raise a `ValueError` for a convolution that PEFT's LoRA layer, made of its kernel and stride, does not match."""
    plain: dict[str, Any] = {
        "groups": 1,
        "padding_mode": "zeros",
        "dilation": (1,) * len(getattr(base, "kernel_size", ())),
    }
    for name, value in plain.items():
        if (found := getattr(base, name, value)) != value:
            raise ValueError(
                f"{key}: a convolution with {name}={found}, but LoRA's, as PEFT builds it, has {name}={value}. Merge "
                "the adapter instead (merge_and_unload)."
            )


def _two_factors(update: AbstractUpdate, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """A (r, in), B (out, r), and the relative error of B A."""
    if isinstance(update, AbstractFactoredUpdate):
        down, core, up = update.factors()
        return down, up * core if core.ndim == 1 else up @ core, 0.0
    assert rank is not None
    weight = update.matrix()  # type: ignore[union-attr]
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    up, down = left * values.sqrt(), values.sqrt()[:, None] * right
    norm = weight.norm()
    return down, up, ((weight - up @ down).norm() / norm).item() if norm > 0 else 0.0


def _pad(tensor: Tensor, key: str, rank: int) -> Tensor:
    dim = 0 if key.endswith("lora_A.weight") else 1
    missing = list(tensor.shape)
    missing[dim] = rank - missing[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim).float().cpu().contiguous()


def _config(model: PeftModel, adapter_name: str, layers: dict[str, TensorLayer], rank: int) -> LoraConfig:
    ours: TensorConfig = model.peft_config[adapter_name]  # type: ignore[assignment]
    if not ours.base_model_name_or_path:
        warnings.warn(
            "the adapter does not say which base model it belongs to: set base_model_name_or_path in the written "
            "adapter_config.json, which servers ask for.",
            stacklevel=3,
        )
    in_full = {"modules_to_save": ours.modules_to_save, "trainable_token_indices": ours.trainable_token_indices}
    for name, value in in_full.items():
        if value:
            warnings.warn(
                f"{name}={value} are exported as they are: PEFT loads them, vLLM and llama.cpp do not.", stacklevel=3
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        base_model_name_or_path=ours.base_model_name_or_path,
        task_type=ours.task_type,
        ensure_weight_tying=ours.ensure_weight_tying,
        inference_mode=True,
        **in_full,  # type: ignore[arg-type]
    )
    # Set afterwards: PEFT makes a set of what it is given, in another order in every process.
    config.target_modules = _target_names(model.get_base_model(), layers)
    return config


def _target_names(model: nn.Module, adapted: Iterable[str]) -> list[str]:
    """The shortest endings of names that say which layers are adapted: `q_proj`, `attention.output.dense`, or all."""
    names, adapted = [name for name, _ in model.named_modules()], set(adapted)
    for shorten in (r".*\.", r".*\.\d+\."):
        endings = {re.sub(shorten, "", name) for name in adapted}
        if {name for name in names if any(f".{name}".endswith(f".{ending}") for ending in endings)} == adapted:
            return sorted(endings)
    return sorted(adapted)


def _save(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    with replace_files(folder, last=CONFIG_NAME) as unfinished:
        save_file(tensors, unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(unfinished))
