"""Files that llama.cpp, and what is built on it, reads as they are: an adapter, or a model with an adapter in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from tensorpeft.export.dense import merge
from tensorpeft.export.lora import (
    ExportedLayer,
    active_adapter,
    adapted_layers,
    low_rank_updates,
    tied_head,
)
from tensorpeft.export.places import check_file
from tensorpeft.export.whole_weights import refuse_trained_in_full, whole_weights
from tensorpeft.loading.adapters import load_on_skeleton
from tensorpeft.reports.files import write_whole
from tensorpeft.reports.folders import sole_writer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# Of the numbers in a file: ours, and llama.cpp's, name of a type.
OUTTYPES = ("f32", "f16", "bf16", "q8_0")


@torch.no_grad()
def to_gguf_lora(
    model_or_path: PeftModel | str | os.PathLike[str],
    out_file: str | os.PathLike[str],
    rank: int | None = None,
    adapter_name: str | None = None,
    outtype: str = "f32",
    progress: bool = False,
    energy: float | None = None,
    *,
    base: str | None = None,
) -> list[ExportedLayer]:
    """Write an adapter of any of our methods as a GGUF LoRA, which llama.cpp adds to a GGUF file of the same base.

    It is `to_lora`'s adapter, exact for the same methods, in llama.cpp's names and order of rows; every layer has its
    own rank.

    Args:
        model_or_path: a PeftModel with an adapter of ours, or the folder of a saved one; of that, the base model is
            only read as a configuration, of a residual one the cores too.
        out_file: file to write; one that is there is replaced.
        rank: what an update of high rank is cut to; must not be given for the others.
        adapter_name: which adapter; None: the active one.
        outtype: f32, f16, bf16 or q8_0. Rows whose length is no multiple of 32 are f16 in a file of q8_0.
        progress: whether to show a progress bar, which an SVD of many layers needs.
        energy: instead of `rank`, as `to_lora` has it.
        base: name of a folder's base model (`tensorpeft.loading.names.resolve`); None: what the adapter's configuration
            names.

    Returns:
        The layers, in the model's order.

    Raises:
        BlockingIOError: another process writes this file.
        ModuleNotFoundError: the library gguf is not installed.
        ValueError: an architecture whose form is not known (Llama, Qwen 2 and 3, and Gemma 3 are), weights besides
            the layers' updates, or what `to_lora` refuses.

    >>> to_gguf_lora("runs/my-lorta", "my-lorta.gguf")  # doctest: +SKIP
    """
    out_file = _checked(out_file, outtype, base)
    from tensorpeft.export.gguf_architectures import LlamaCppModel

    with sole_writer(out_file.parent, out_file.name):
        is_path = isinstance(model_or_path, (str, os.PathLike))
        model = load_on_skeleton(model_or_path, base) if is_path else model_or_path
        name, plain = adapter_name or active_adapter(model), model.get_base_model()
        form = LlamaCppModel(type(plain).__name__, plain.config)  # type: ignore[arg-type]
        layers = adapted_layers(model, name)
        refuse_trained_in_full(
            model.peft_config[name],
            "llama.cpp's adapters have nothing but layers' updates. Merge the adapter into its base instead "
            "(--merged).",
            keys=whole_weights(model, name, model_or_path if is_path else None),
        )
        if (head := tied_head(model, layers)) is not None:
            raise ValueError(
                f"{head}: it is the embedding too, and llama.cpp adds no adapter to its use as the head alone. Merge "
                "the adapter into its base instead (--merged)."
            )
        tensors: dict[str, Tensor] = {}
        exported = []
        low_ranks = low_rank_updates(layers, name, rank, energy)
        for key, low_rank in tqdm(low_ranks, "Exporting", len(layers), disable=not progress):
            down, up = low_rank.factors
            exported.append(ExportedLayer(key, len(down), low_rank.error_of(low_rank.factors)))
            stored = form.stored_name(f"{key}.weight")
            tensors[f"{stored}.lora_a"] = down
            tensors[f"{stored}.lora_b"] = form.stored(f"{key}.weight", up)
        ranks = {layer.rank for layer in exported}

        def add_fields(writer: GGUFWriter) -> None:
            from gguf import GGUFType, Keys

            writer.add_type(GGUFType.ADAPTER)
            writer.add_string(Keys.Adapter.TYPE, "lora")
            # llama.cpp multiplies a layer by alpha / rank, or, where alpha is zero, by nothing.
            writer.add_float32(Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)

        _write(out_file, form.name, add_fields, tensors, outtype)
        return exported


@torch.no_grad()
def to_gguf_model(
    adapter: str | os.PathLike[str],
    out_file: str | os.PathLike[str],
    outtype: str = "f16",
    base: str | None = None,
) -> None:
    """Merge a saved adapter, of any method, into its base and write a GGUF model with its tokenizer.

    The base is held in float32, and its 4-bit weights are dequantised first (see `to_dense`); numbers are rounded once,
    when they are written.

    Args:
        adapter: folder of the saved adapter.
        out_file: file to write; one that is there is replaced.
        outtype: of the matrices, f32, f16, bf16 or q8_0; vectors are f32. Rows whose length is no multiple of 32 are
            f16 in a file of q8_0.
        base: name of the base model (`tensorpeft.loading.names.resolve`); None: what the adapter's configuration names.

    Raises:
        BlockingIOError: another process writes this file.
        ModuleNotFoundError: the library gguf is not installed.
        ValueError: an architecture or a tokenizer whose form is not known, or what `to_dense` refuses.
    """
    out_file = _checked(out_file, outtype, base)
    from tensorpeft.export.gguf_architectures import LlamaCppModel
    from tensorpeft.export.gguf_vocabulary import add_vocabulary

    with sole_writer(out_file.parent, out_file.name):
        model, tokenizer = merge(Path(adapter), torch.float32, base)
        form = LlamaCppModel(type(model).__name__, model.config)
        if tokenizer is None:
            raise ValueError(
                f"{adapter}: neither it nor its base has a tokenizer, which a GGUF model needs. Save it beside the "
                "adapter (tokenizer.save_pretrained)."
            )
        weights: dict[str, Tensor] = model.state_dict()
        if torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
            del weights["lm_head.weight"]  # llama.cpp takes the embedding
        tensors = {form.stored_name(key): form.stored(key, tensor) for key, tensor in weights.items()}

        def add_fields(writer: GGUFWriter) -> None:
            from gguf import GGUFType, LlamaFileType

            writer.add_type(GGUFType.MODEL)
            writer.add_file_type(LlamaFileType[f"{'ALL' if outtype == 'f32' else 'MOSTLY'}_{outtype.upper()}"])
            form.add_settings(writer)
            add_vocabulary(writer, tokenizer, model.config)

        _write(out_file, form.name, add_fields, form.extra_tensors() | tensors, outtype)


def _checked(out_file: str | os.PathLike[str], outtype: str, base: str | None) -> Path:
    check_file(out_file, base)  # which may be a GGUF file, too
    if outtype not in OUTTYPES:
        raise ValueError(f"outtype={outtype!r}: expected {', '.join(OUTTYPES)}.")
    if Path(out_file).is_dir():
        raise ValueError(f"{out_file}: it is a folder, expected the name of a file, such as adapter.gguf.")
    if find_spec("gguf") is None:
        raise ModuleNotFoundError("No module named 'gguf', which writes GGUF files", name="gguf")
    return Path(out_file)


def _write(
    path: Path,
    architecture: str,  # llama.cpp's name
    add_fields: Callable[[Any], None],  # takes the writer
    tensors: Mapping[str, Tensor],
    outtype: str,
) -> None:
    """Write a file, whole; one tensor at a time is held a second time."""
    from gguf import GGML_QUANT_VERSION, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    with write_whole(path) as unfinished:
        writer = GGUFWriter(unfinished, architecture)
        writer.add_name(path.stem)
        add_fields(writer)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        kinds = {name: _kind(tensor, outtype) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            size = torch.Size(quant_shape_to_byte_shape(tensor.shape, kinds[name])).numel()
            writer.add_tensor_info(name, tensor.shape, torch.empty(0).numpy().dtype, size, kinds[name])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors.items():
                numbers = tensor.float().cpu().contiguous()
                if kinds[name].name == "F16" and numbers.abs().max() > torch.finfo(torch.float16).max:
                    raise ValueError(f"{name}: numbers beyond the largest of float16. Write bf16 or f32 (--outtype).")
                writer.write_tensor_data(quantize(numbers.numpy(), kinds[name]))
        finally:
            writer.close()


def _kind(tensor: Tensor, outtype: str) -> GGMLQuantizationType:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[outtype.upper()] if tensor.ndim > 1 else GGMLQuantizationType.F32
    return kind if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16
