"""The updates alone, in 8 or 4 bits: the smallest form of an adapter of high rank that needs no cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tensorpeft.export.lora import active_adapter, adapted_layers, tied_head
from tensorpeft.export.places import check_folder
from tensorpeft.export.whole_weights import refuse_trained_in_full, whole_weights
from tensorpeft.loading.adapters import load_on_skeleton
from tensorpeft.networks.rounded_blocks import BLOCK_SIZE, from_blocks, to_blocks
from tensorpeft.plugin.layer import check_weight_update
from tensorpeft.quantization.delta import BITS, CONFIG_NAME, WEIGHTS_NAME, DeltaConfig, digest_of
from tensorpeft.reports.folders import replace_files, sole_writer


@dataclass(frozen=True)
class DeltaLayer:
    """One layer of a delta.

    Args:
        name: full name of the layer in the model.
        error: ‖ΔW − scale · q‖ / ‖ΔW‖ in the Frobenius norm.
    """

    name: str
    error: float


@torch.no_grad()
def to_delta(
    model_or_path: PeftModel | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    bits: int = 8,
    adapter_name: str | None = None,
    progress: bool = False,
    *,
    base: str | None = None,
    finish: Callable[[Path], object] = lambda folder: None,
) -> list[DeltaLayer]:
    """Write the update ΔW of every adapted weight in few bits; `tensorpeft.load_delta` adds them to a base's weights.

    ΔW, the scale of the method included, is quantised symmetrically in blocks of 32 numbers, row by row: 8 bits are
    whole numbers -127 … 127, 4 bits -7 … 7, to the nearest, halves to even, and a block has one scale, its largest
    number by the largest whole one, in bfloat16. That is 8.5 or 4.5 bits per number of ΔW, whatever its rank. One ΔW
    at a time is in memory; so are the files' numbers.

    Args:
        model_or_path: a PeftModel with an adapter of ours, of any method that merges, or the folder of a saved one; of
            that, the base model is only read as a configuration, of a residual one the cores too.
        out_dir: folder for delta_config.json and delta.safetensors; made where it does not exist.
        bits: 8 or 4.
        adapter_name: which adapter; None: the active one.
        progress: whether to show a progress bar.
        base: name of a folder's base model (`tensorpeft.loading.names.resolve`), which is what the delta names as its
            own; None: what the adapter's configuration names.
        finish: called with a folder of the finished files before they are put in place; if it raises, nothing has
            changed.

    Returns:
        The layers, in the model's order.

    Raises:
        BlockingIOError: another process writes to `out_dir`.
        ValueError: no adapter of ours in the model, one that is not linear, other bits, an update that is not finite,
            or weights besides the layers' updates (`modules_to_save`, `trainable_token_indices`, a resized
            vocabulary); `out_dir` is the adapter's or the base's, or holds an adapter or a model.

    >>> to_delta("runs/my-dota", "runs/my-delta", bits=4)  # doctest: +SKIP
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits}: expected {' or '.join(map(str, BITS))}.")
    check_folder(out_dir, CONFIG_NAME, model_or_path, base)
    with sole_writer(Path(out_dir)):
        is_path = isinstance(model_or_path, (str, os.PathLike))
        model = load_on_skeleton(model_or_path, base) if is_path else model_or_path
        name = adapter_name or active_adapter(model)
        layers = adapted_layers(model, name)
        config = model.peft_config[name]
        refuse_trained_in_full(
            config,
            "a delta has nothing but layers' updates. Merge the adapter into its base instead (merge_and_unload, or "
            "`tensorpeft export dense`).",
            keys=whole_weights(model, name, model_or_path if is_path else None),
        )
        if (head := tied_head(model, layers)) is not None:
            raise ValueError(
                f"{head}: its weight is that of the embedding too, and the delta would be for one of them. Merge the "
                "adapter into its base instead (merge_and_unload, or `tensorpeft export dense`)."
            )
        updates = {key: check_weight_update(name, layer.updates[name]) for key, layer in layers.items()}
        exported, shapes, tensors = list[DeltaLayer](), dict[str, tuple[int, int]](), dict[str, Tensor]()
        for key, update in tqdm(updates.items(), "Exporting", disable=not progress):
            matrix = update.matrix()
            if not matrix.isfinite().all():
                raise ValueError(f"{key}: its update is not finite. Check the adapter, and the loss it was trained to.")
            blocks = to_blocks(matrix, bits)
            shapes[key] = (int(matrix.shape[0]), int(matrix.shape[1]))
            exported.append(DeltaLayer(key, _error(matrix, from_blocks(blocks, shapes[key], bits))))
            tensors |= {f"{key}.{part}": tensor.cpu() for part, tensor in blocks._asdict().items()}
        with replace_files(Path(out_dir), last=CONFIG_NAME) as unfinished:
            save_file(tensors, unfinished / WEIGHTS_NAME, metadata={"format": "pt"})
            method = str(getattr(config.peft_type, "value", config.peft_type))
            named = base or config.base_model_name_or_path
            DeltaConfig(named, method, bits, BLOCK_SIZE, digest_of(unfinished / WEIGHTS_NAME), shapes).save(unfinished)
            with torch.enable_grad():
                finish(unfinished)
        return exported


def _error(matrix: Tensor, written: Tensor) -> float:
    norm = matrix.norm()
    return ((matrix - written).norm() / norm).item() if norm > 0 else 0.0
