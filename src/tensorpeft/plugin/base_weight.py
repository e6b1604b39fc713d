"""The frozen weight under an adapter, read as (out, in) whatever layer holds it."""

from __future__ import annotations

from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def linear_shape(
    base: nn.Module,
    name: str,
    parent: nn.Module | None = None,
    backend: QuantizationBackend | None = None,
) -> tuple[int, int]:  # (out, in)
    """The size of a linear layer: `nn.Linear`, GPT-2's `Conv1D`, or a quantised layer that PEFT has a backend for.

    Raises:
        ValueError: any other layer, or the output projection of `nn.MultiheadAttention`, whose forward is never called.
    """
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name}: torch's nn.MultiheadAttention uses this layer's weight without calling the layer, so that an "
            "adapter would have no effect. Remove it from target_modules, or name it in exclude_modules."
        )
    if isinstance(base, Conv1D):
        in_, out = base.weight.shape
        return out, in_
    if isinstance(base, nn.Linear) or (backend is not None and hasattr(base, "in_features")):
        return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
    raise ValueError(
        f"{name}: cannot adapt a {type(base).__name__}, expected a linear layer (torch.nn.Linear, transformers' "
        "Conv1D, or a quantised linear layer that PEFT supports). Narrow target_modules, or name it in exclude_modules."
    )


def addable_weight(base: nn.Module) -> Tensor | None:
    """The weight (out, in) where `base(x)` is exactly `F.linear(x, weight, bias)`, as a view; else None.

    None for quantised layers, subclasses, layers with hooks (offloading, DeepSpeed) or a replaced `forward`: their own
    forward must run. None too for a sharded weight (FSDP2, tensor parallel), which only its module's forward gathers.
    """
    if type(base) not in (nn.Linear, Conv1D) or "forward" in base.__dict__:
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    weight = base.weight
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return None
    return weight.t() if isinstance(base, Conv1D) else weight


def oriented(base: nn.Module, weight: Tensor) -> Tensor:
    """A base layer's stored weight as (out, in), or (out, in) as stored: the same transposition both ways."""
    return weight.t() if isinstance(base, Conv1D) else weight


def restore_row_order(base: nn.Module) -> None:
    """Undo bitsandbytes' repacking of a 4-bit weight for AVX512, so that it can be dequantised.

    Its first eval forward on such a CPU reorders the weight in place; `dequantize_4bit` would then return a scrambled
    matrix. The next forward repacks it. Until bitsandbytes 0.50 dequantises packed weights.
    """
    weight = getattr(base, "weight", None)
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        assert weight is not None
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
