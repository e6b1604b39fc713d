"""An adapter as a plain LoRA checkpoint: the form that PEFT, vLLM, SGLang and llama.cpp all read."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCardData
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from tensorpeft.export.places import check_folder
from tensorpeft.export.tokenizer import TOKENIZER_FILES, load_tokenizer
from tensorpeft.export.truncation import of_energy, of_rank
from tensorpeft.export.whole_weights import trained_in_full, whole_weights
from tensorpeft.loading.adapters import load_on_skeleton
from tensorpeft.loading.models import pinned
from tensorpeft.networks.dtypes import at_least_float32
from tensorpeft.networks.low_rank import Pair
from tensorpeft.networks.update import AbstractFactoredUpdate, AbstractUpdate
from tensorpeft.plugin.base_weight import StackedWeight
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.layer import TensorLayer, check_weight_update
from tensorpeft.reports.folders import replace_files, sole_writer

# What vLLM's --max-lora-rank may be; an adapter may have any rank up to it.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an exported adapter.

    Args:
        name: full name of the layer in the model.
        rank: of its factors.
        error: ‖ΔW − B A‖ / ‖ΔW‖ in the Frobenius norm, of what was written; zero where the update is a product of
            thin factors that lost nothing in a cast.
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
    *,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    finish: Callable[[Path], object] = lambda folder: None,
) -> list[ExportedLayer]:
    """Write an adapter of any of our methods as a LoRA that needs nothing of ours to be loaded.

    LoRTA, LoTR, FacT, MetaTT, TensLoRA, LoRETTA (rep), FLoRA, NOLA and Quantum-PEFT have two thin factors per layer:
    the export is exact, without an SVD. Shared factors are written out per layer, so that the file is as large as a
    LoRA's. The updates of DoTA, QuanTA, SuperLoRA, LoRA-PT and tCURLoRA have a high rank: they are cut to `rank`, or
    each to the least that keeps `energy`, by a truncated SVD, and the error of every layer is returned. Layers keep
    their own ranks (`rank_pattern`); the scale is folded in (`lora_alpha = r`).

    Args:
        model_or_path: a PeftModel with an adapter of ours, or the folder of a saved one; of that, the base model is
            only read as a configuration, of a residual one the cores too, and the tokenizer, where it has one, is
            copied.
        out_dir: folder for adapter_config.json, adapter_model.safetensors and a model card; made where it does not
            exist.
        rank: what an update of high rank is cut to, at most 512; must not be given for the others.
        adapter_name: which adapter; None: the active one.
        progress: whether to show a progress bar, which an SVD of many layers needs.
        energy: instead of `rank`: the share of ‖ΔW‖² to keep in every layer, above 0 and at most 1.
        dtype: of the factors; None: float16 where the base is in 16 bits, else float32. In 16 bits, A and B are of one
            size, so that neither falls below what the format holds.
        base: name of a folder's base model (`tensorpeft.loading.names.resolve`), which is what the export names as its
            own; None: what the adapter's configuration names.
        finish: called with a folder of the finished files before they are put in place; if it raises, nothing has
            changed.

    Returns:
        The layers, in the model's order.

    Raises:
        BlockingIOError: another process writes to `out_dir`.
        ValueError: no adapter of ours in the model, one that is not linear, a convolution that PEFT's LoRA does not
            match (groups, dilation, padding mode), a rank or energy missing, unneeded, or one that would need a rank
            above 512, factors that the dtype does not hold; `out_dir` is the adapter's or the base's, or holds a model,
            or an adapter that is no plain LoRA.

    >>> to_lora("runs/my-lorta", "runs/my-lora")  # doctest: +SKIP
    """
    check_folder(out_dir, CONFIG_NAME, model_or_path, base)
    with sole_writer(Path(out_dir)):
        is_path = isinstance(model_or_path, (str, os.PathLike))
        model = load_on_skeleton(model_or_path, base) if is_path else model_or_path
        name = adapter_name or active_adapter(model)
        layers = adapted_layers(model, name)
        dtype = dtype or (torch.float16 if _is_half(model) else torch.float32)
        exported, tensors = list[ExportedLayer](), dict[str, Tensor]()
        low_ranks = low_rank_updates(layers, name, rank, energy)
        for key, low_rank in tqdm(low_ranks, "Exporting", len(layers), disable=not progress):
            written = _cast(key, low_rank.factors, dtype)
            exported.append(ExportedLayer(key, len(written.down), low_rank.error_of(written)))
            kernel = getattr(layers[key].get_base_layer(), "kernel_size", ())
            down, up = written.down.unflatten(1, (-1, *kernel)) if kernel else written.down, written.up
            tensors[f"base_model.model.{key}.lora_A.weight"] = down.cpu().contiguous()
            tensors[f"base_model.model.{key}.lora_B.weight"] = up[(..., *(None for _ in kernel))].cpu().contiguous()
        whole = whole_weights(model, name, model_or_path if is_path else None)
        config = _config(model, name, layers, {layer.name: layer.rank for layer in exported}, base, whole)
        with replace_files(Path(out_dir), last=CONFIG_NAME, stale=TOKENIZER_FILES) as unfinished:
            save_file({**tensors, **whole}, unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            config.save_pretrained(str(unfinished))
            _write_card(unfinished, model.peft_config[name], config.base_model_name_or_path)
            if is_path and (tokenizer := load_tokenizer(model_or_path)) is not None:
                tokenizer.save_pretrained(unfinished)
            with torch.enable_grad():
                finish(unfinished)
        return exported


class LowRank(NamedTuple):
    """An update as two thin factors."""

    factors: Pair  # float32 (or float64)
    cut_from: Tensor | None  # ΔW (out, in), where the factors are less than it

    def error_of(self, written: Pair) -> float:
        """‖ΔW − up · down‖ / ‖ΔW‖ of the factors as they were written."""
        if self.cut_from is not None:
            difference, norm = (self.cut_from - written.up.float() @ written.down.float()).norm(), self.cut_from.norm()
            return (difference / norm).item() if norm > 0 else 0.0
        if all(torch.equal(factor, other.to(factor)) for factor, other in zip(self.factors, written)):
            return 0.0
        (down, up), (other_down, other_up) = (map(Tensor.double, pair) for pair in (self.factors, written))
        norm = _norm(down, up)
        return _norm(torch.cat([down, other_down]), torch.cat([up, -other_up], 1)) / norm if norm > 0 else 0.0


def low_rank_updates(
    layers: Mapping[str, TensorLayer],  # by their names in the model
    adapter_name: str,
    rank: int | None = None,
    energy: float | None = None,
) -> Iterator[tuple[str, LowRank]]:
    """The update of every layer, one at a time; `rank` and `energy` as `to_lora` has them.

    Raises:
        ValueError: before the first layer, or at one that needs a rank above 512.
    """
    updates: dict[str, AbstractUpdate] = {key: layer.updates[adapter_name] for key, layer in layers.items()}  # type: ignore[misc]
    for update in updates.values():
        check_weight_update(adapter_name, update)
    _check_rank(updates, rank, energy)
    for key, layer in layers.items():
        _check_geometry(key, layer.get_base_layer())
    return ((key, _low_rank(key, update, rank, energy)) for key, update in updates.items())


def has_exact_lora(model: PeftModel) -> bool:
    """Whether the active adapter is exported without a rank: every update is a product of two thin factors.

    Raises:
        ValueError: it is none of ours, or several are active.
    """
    name = active_adapter(model)
    layers = adapted_layers(model, name).values()
    return all(isinstance(layer.updates[name], AbstractFactoredUpdate) for layer in layers)


def adapted_layers(model: PeftModel, name: str) -> dict[str, TensorLayer]:
    """The layers that an adapter of ours changes, by name, in the model's order.

    Raises:
        ValueError: there is none.
    """
    modules = model.get_base_model().named_modules()
    layers = {key: module for key, module in modules if isinstance(module, TensorLayer) and name in module.updates}
    if not layers:
        config = model.peft_config.get(name)
        if config is not None and not isinstance(config, TensorConfig):
            method = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"{name!r} is an adapter of PEFT's own ({method}), expected one of tensorpeft. Engines take a LoRA as "
                "it is; PEFT merges the others (merge_and_unload)."
            )
        raise ValueError(
            f"no layer has an adapter {name!r} of tensorpeft; loaded are {sorted(model.peft_config)}. Pass a PeftModel "
            "or a folder with one, and the adapter's name."
        )
    return layers


def tied_head(model: PeftModel, layers: Mapping[str, TensorLayer]) -> str | None:
    """The name of an adapted head whose weight is the embedding's, too; the tie itself may be lost on a skeleton."""
    base: Any = model.get_base_model()
    is_tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    head = base.get_output_embeddings() if is_tied and hasattr(base, "get_output_embeddings") else None
    return next((key for key, layer in layers.items() if layer is head), None)


def _is_half(model: PeftModel) -> bool:
    config = getattr(model.get_base_model(), "config", None)
    return getattr(config, "dtype", None) in (torch.bfloat16, torch.float16)


def active_adapter(model: PeftModel) -> str:
    """The name of the one adapter that is active.

    Raises:
        ValueError: none is, or several are.
    """
    if len(model.active_adapters) != 1:
        raise ValueError(f"{len(model.active_adapters)} adapters are active: say which to export, adapter_name=...")
    return model.active_adapters[0]


def _check_rank(updates: Mapping[str, AbstractUpdate], rank: int | None, energy: float | None) -> None:
    """Raise a `ValueError` unless rank or energy is given exactly where there is something to cut."""
    high = [key for key, update in updates.items() if not isinstance(update, AbstractFactoredUpdate)]
    if rank is not None and energy is not None:
        raise ValueError(f"rank={rank} and energy={energy}: expected one of them.")
    if high and rank is None and energy is None:
        raise ValueError(
            f"{high[0]}: its update has a high rank, so that a LoRA of it has an error. Pass the rank to cut it to "
            "(--rank), or the share of its energy to keep, such as 0.99 (--energy), or merge the adapter instead "
            "(merge_and_unload, `tensorpeft export dense`)."
        )
    if not high and (rank is not None or energy is not None):
        given = f"rank={rank}" if energy is None else f"energy={energy}"
        raise ValueError(f"{given}: this adapter has low rank and is exported exactly. Leave it out.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy}: expected a share of the update's energy, above 0 and at most 1.")
    known = [update.factors().rank for update in updates.values() if isinstance(update, AbstractFactoredUpdate)]
    largest = max([*known, 1 if rank is None else rank])
    if not 1 <= (largest if rank is None else rank) <= SERVED_RANKS[-1]:
        raise ValueError(f"rank {largest}: expected 1 to {SERVED_RANKS[-1]}, the largest that LoRA servers take.")


def _check_geometry(key: str, base: nn.Module) -> None:
    """Raise a `ValueError` for a convolution that PEFT's LoRA layer, made of its kernel and stride, does not match.

    Or for an expert that is a part of a parameter, which is no layer at all.
    """
    if isinstance(base, StackedWeight):
        raise ValueError(
            f"{key}: an expert that is a part of a parameter; a plain LoRA checkpoint has layers alone. Merge the "
            "adapter instead (merge_and_unload, or `tensorpeft export dense`)."
        )
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


def _low_rank(key: str, update: AbstractUpdate, rank: int | None, energy: float | None) -> LowRank:
    if isinstance(update, AbstractFactoredUpdate):
        return LowRank(Pair(*map(at_least_float32, update.factors().pair())), None)
    weight: Tensor = update.matrix()  # type: ignore[operator]
    factors = of_rank(weight, rank) if rank is not None else of_energy(weight, energy or 1.0, SERVED_RANKS[-1])
    if factors is None:
        raise ValueError(
            f"{key}: to keep {energy} of its energy needs a rank above {SERVED_RANKS[-1]}, the largest that LoRA "
            "servers take. Keep less, cut to a rank, or merge the adapter instead (merge_and_unload)."
        )
    return LowRank(factors, weight)


def _cast(key: str, factors: Pair, dtype: torch.dtype) -> Pair:
    """The factors in a dtype; in 16 bits scaled by a power of two, which costs no bit, to be of one size."""
    down, up = factors
    if dtype.itemsize < 4 and min(down.abs().max(), up.abs().max()) > 0:
        shift = torch.log2(down.abs().max() / up.abs().max()).div(2).round()
        down, up = down * torch.exp2(-shift), up * torch.exp2(shift)
    cast = Pair(down.to(dtype), up.to(dtype))
    if not all(factor.isfinite().all() for factor in cast):
        raise ValueError(f"{key}: a factor is NaN, or not within what {dtype} holds. Pass dtype=torch.float32.")
    return cast


def _norm(down: Tensor, up: Tensor) -> float:
    """‖up · down‖, without the product."""
    return (torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T).norm().item()


def _config(
    model: PeftModel,
    adapter_name: str,
    layers: Mapping[str, TensorLayer],
    ranks: Mapping[str, int],
    base: str | None,
    whole: Collection[str],  # keys of the adapter's `whole_weights`
) -> LoraConfig:
    ours: TensorConfig = model.peft_config[adapter_name]  # type: ignore[assignment]
    if not (base := base or ours.base_model_name_or_path):
        warnings.warn(
            "the adapter does not say which base model it belongs to: set base_model_name_or_path in the written "
            "adapter_config.json, which servers ask for.",
            stacklevel=3,
        )
    base_class = type(model.get_base_model())
    mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}  # as PEFT writes it
    for name, value in trained_in_full(ours, whole).items():
        warnings.warn(
            f"{name}={value} are exported as they are: PEFT loads them, vLLM and llama.cpp's converter refuse such "
            "an adapter. Merge it for those (export dense).",
            stacklevel=3,
        )
    rank = max(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        base_model_name_or_path=base,
        task_type=ours.task_type,
        auto_mapping=ours.auto_mapping or (mapping if ours.task_type is None else None),
        **pinned(ours, base or ""),  # pyright: ignore[reportArgumentType]
        ensure_weight_tying=ours.ensure_weight_tying,
        inference_mode=True,
        **trained_in_full(ours),
    )
    # Everywhere alpha / r is 1: PEFT divides them per layer, vLLM for all.
    config.rank_pattern = config.alpha_pattern = {
        # From the beginning of the name: PEFT looks for the key as an ending, too.
        f"^{key}": other
        for key, other in ranks.items()
        if other != rank
    }
    # Set afterwards: PEFT makes a set of what it is given, in another order in every process.
    config.target_modules = _target_names(model.get_base_model(), layers)
    return config


def _write_card(folder: Path, ours: PeftConfig, base: str | None) -> None:
    """Who made it, and of which base: what the Hub shows and servers look up."""
    method = str(getattr(ours.peft_type, "value", ours.peft_type))
    data = ModelCardData(base_model=base or None, library_name="peft", tags=["lora", "tensorpeft", method.lower()])
    text = f"A LoRA that `tensorpeft export lora` made of a {method} adapter" + (f" of `{base}`" if base else "")
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}.\n", encoding="utf-8")


def _target_names(model: nn.Module, adapted: Iterable[str]) -> list[str]:
    """The shortest endings of names that say which layers are adapted: `q_proj`, `attention.output.dense`, or all."""
    names, adapted = [name for name, _ in model.named_modules()], set(adapted)
    for shorten in (r".*\.", r".*\.\d+\."):
        endings = {re.sub(shorten, "", name) for name in adapted}
        if {name for name in names if any(f".{name}".endswith(f".{ending}") for ending in endings)} == adapted:
            return sorted(endings)
    return sorted(adapted)
