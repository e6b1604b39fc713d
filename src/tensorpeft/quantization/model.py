"""A model in memory becomes a residual base, and a residual base a plain model again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from tensorpeft.networks.mpo import MpoUpdate
from tensorpeft.plugin.base_weight import weight_of
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.tensor_map import plan_updates, settle
from tensorpeft.quantization.quantizer import ResidualConfig, forget_reading, kept_in_float32, mark_quantised

# What PEFT trains in full, and saves, for tasks with a head of their own.
_TASK_HEADS = ("classifier", "score", "qa_outputs")
Shapes = list[list[int]]  # of the cores of one weight


@torch.no_grad()
def quantize_residual(
    model: nn.Module,
    config: TensorConfig | None,
    rounds: int = 1,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    skip_modules: Sequence[str] = (),
    progress: bool = False,
) -> nn.Module:
    """The model with its weights in 4 bits, in place: QDoTA's base. One weight at a time, on the weight's device.

    The layers that `config` targets become `NF4(W0 − MPO(T_start))` with the cores T_start beside it; all other linear
    layers but the output head become plain NF4, as in QLoRA. `get_peft_model(model, config)` then starts from T_start.

    Args:
        model: in full or half precision.
        config: a `DotaConfig`: the layers, the modes and the bond; with r="auto" the bonds are chosen now, and written
            into it. None: every layer is plain NF4, QLoRA's base.
        rounds: of decomposition and quantisation; 1 is the paper's one shot, more lower the error.
        double_quant: whether the scales of the blocks of 64 weights are quantised too, as in QLoRA.
        compute_dtype: what products run in; None: in the dtype of the input.
        skip_modules: names (endings) of further linear layers to leave as they are.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the configuration is of another method or finds no layer, the model is quantised or has adapters
            already, or a weight is not finite; nothing has been changed.

    Source: DoTA (arXiv 2412.20891), section 3.3.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft import get_peft_model
    >>> from tensorpeft import DotaConfig
    >>> llama = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    >>> config = DotaConfig(r=4, num_cores=3, target_modules=["q_proj", "up_proj"])
    >>> model = get_peft_model(quantize_residual(LlamaForCausalLM(llama), config), config)
    """
    from tensorpeft.quantization.residual import ResidualLinear4bit, fill, nf4_linear, quantise, split

    shapes, plain = plan_layers(model, config, skip_modules)
    names = [*shapes, *plain]
    for name in names:  # before the first one is replaced
        if not torch.isfinite(model.get_submodule(name).weight).all():  # type: ignore[arg-type]
            raise ValueError(f"{name}: the weight is not finite, expected finite numbers. Check the checkpoint.")
    for name in tqdm(names, desc="quantising", unit="weight", disable=not progress):
        old = model.get_submodule(name)
        weight = weight_of(old)
        if name in shapes:
            parts = split(weight, *network_of(shapes[name]), rounds=rounds, double_quant=double_quant)
            new = ResidualLinear4bit.from_split(parts, old.bias, compute_dtype)  # type: ignore[arg-type]
        else:
            new = fill(
                nf4_linear(weight.shape, old.bias is not None, compute_dtype, double_quant),
                quantise(weight, double_quant),
                old.bias,  # type: ignore
            )
        new.source_cls = type(old)  # type: ignore[assignment]
        model.set_submodule(name, new.train(old.training))
    dtype = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
    mark_quantised(model, ResidualConfig(shapes, plain, dtype, double_quant, rounds))
    return model


def plan_layers(
    model: nn.Module,  # may be on the meta device
    config: TensorConfig | None,
    skip_modules: Sequence[str] = (),
) -> tuple[dict[str, Shapes], list[str]]:
    """The layers that get a residual, with their cores' shapes, and the names of those that get plain NF4.

    Raises:
        ValueError: see `quantize_residual`.
    """
    if any(hasattr(module, "quant_state") or hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model is quantised or has adapters already. Load it in full or half precision, without "
            "quantization_config, and quantise it before get_peft_model."
        )
    check_targets(config)
    if config is not None:
        settle(model, config)  # in the configuration itself: the adapter has to fit the base that is made with it
    updates = {} if config is None else plan_updates(model, config)
    if other := next((update for update in updates.values() if not isinstance(update, MpoUpdate)), None):
        raise ValueError(
            f"a residual base needs a matrix product operator to subtract, but {type(config).__name__} makes "
            f"{type(other).__name__}. Pass a DotaConfig; other methods work on any quantised base as it is."
        )
    shapes = {name: _core_shapes(update) for name, update in updates.items()}  # type: ignore[arg-type]
    kept = {*skip_modules, *(getattr(config, "modules_to_save", None) or ()), *_TASK_HEADS}
    if isinstance(model, PreTrainedModel):
        kept |= {key.removesuffix(".bias") for key in get_keys_to_not_convert(model)}
        in_float32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        in_float32 = {key.removesuffix(".weight") for key in in_float32}
        _check_kept(shapes, in_float32)
        kept |= in_float32
    plain = [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and name not in shapes and not _is_in(name, kept)
    ]
    for name in (*shapes, *plain):
        dtype = model.get_submodule(name).weight.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name}: cannot quantise a weight in {dtype}, expected float32, bfloat16 or float16. Load the model "
                "in one of these, without quantization_config."
            )
    return shapes, plain


def _check_kept(names: Iterable[str], in_float32: Iterable[str]) -> None:
    """Raise a `ValueError` if a layer is one that its model needs as it is: T5 casts `wo`'s input to its dtype."""
    if name := next((name for name in names if _is_in(name, in_float32)), None):
        raise ValueError(
            f"{name}: transformers keeps {sorted(in_float32)} of this model out of 4 bits. Leave them out of "
            "target_modules, or adapt the base as it is, in 16 or 32 bits."
        )


def check_targets(config: TensorConfig | None) -> None:
    """Raise a `ValueError` if a configuration adapts what is no layer: that has no 4-bit form here."""
    if config is not None and config.target_parameters:
        raise ValueError(
            f"target_parameters={config.target_parameters!r}: a residual base is made of linear layers; experts that "
            "are one parameter stay as they are. Leave them out here, or adapt them on the base as it was."
        )


def _is_in(name: str, keys: Iterable[str]) -> bool:
    """Whether a layer is, or lies in, a module whose name ends like one of these: PEFT's rule for modules_to_save."""
    parts = name.split(".")
    paths = [".".join(parts[: k + 1]) for k in range(len(parts))]
    return any(path.endswith(key) for path in paths for key in keys)


def _core_shapes(update: MpoUpdate) -> Shapes:
    return [list(core.shape) for core in update.cores()]


def network_of(shapes: Shapes) -> tuple[list[int], list[int], list[int]]:
    """Output modes, input modes and inner bonds of cores with these shapes."""
    return [shape[1] for shape in shapes], [shape[2] for shape in shapes], [shape[3] for shape in shapes[:-1]]


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with every 4-bit weight as a plain `nn.Linear`, in place; with what `merge_and_unload` left, a model
    that loads anywhere.

    Args:
        model: a residual base, or any model with bitsandbytes' 4-bit layers, merged or without adapters.
        dtype: of the whole model; None: the one that it has.

    Raises:
        ValueError: the model has adapters: they would be lost in it, or would no longer fit; or its weights are
            quantised in another form than bitsandbytes' 4 bits.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model has adapters. Call merge_and_unload() (or unload()) first, then dequantize.")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, Bnb4BitHfQuantizer):
        method = getattr(quantizer.quantization_config, "quant_method", None)
        raise ValueError(
            f"the model is quantised by {type(quantizer).__name__} ({getattr(method, 'value', method)}), expected "
            "bitsandbytes' 4 bits or no quantisation. Load the base without quantisation, in 16 or 32 bits."
        )
    from tensorpeft.quantization.residual import dequantize_layers

    dequantize_layers(model, dtype)
    if isinstance(model, PreTrainedModel) and quantizer is not None:
        forget_reading(model)
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = model.config._is_quantized = False  # type: ignore[attr-defined]
        model.hf_quantizer = None  # type: ignore[assignment]
    return model if dtype is None else _cast(model, dtype)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in a dtype, but for what transformers keeps in float32 in it, and what is not saved of it, such as the
    frequencies of positions.
    """
    kept = kept_in_float32(model, dtype)
    parameters = [(parameter, parameter.data) for name, parameter in model.named_parameters() if name in kept]
    buffers = [
        (module, name, buffer)
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set or f"{path}.{name}" in kept
    ]
    model.to(dtype)
    for parameter, numbers in parameters:
        parameter.data = numbers
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    return model
