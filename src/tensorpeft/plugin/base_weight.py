"""The frozen weight under an adapter, read as (out, in) whatever layer holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.modeling import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend, TorchaoBackend, resolve_quantization_backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from tensorpeft.networks.update import AbstractUpdatableLinear
from tensorpeft.plugin.direct_reads import reads_weight_itself
from tensorpeft.sites import Convolution, Site


class UpdatableBackend(QuantizationBackend):
    """Reads a layer that adds updates by itself, and merges it into a plain layer: not quantised again.

    Args:
        dtype: of the matrix; None: that of the model.

    Quantising a merged weight would round an update of a few percent away that was trained to repair rounding.
    """

    layer_type = "linear"
    supports_merge = True
    backend_name = "updatable"

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The matrix (out, in)."""
        if isinstance(base_layer, AbstractUpdatableLinear):
            return base_layer.weight_with((), self.dtype)
        return base_layer.weight.data  # type: ignore[return-value]  # merged already

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Replace the innermost layer by a plain one with this weight, laid out as that layer stores it."""
        base = peft_layer.get_base_layer()
        set_innermost(peft_layer, plain_layer(base, as_matrix(base, weight_data)))


class StackedWeight(nn.Module):
    """One matrix of a parameter (stack, out, in) that a module multiplies by: a linear layer that is never called.

    It has no parameters of its own, and refers to the module plainly.

    Args:
        owner: the module that holds the parameter. With a true `is_transposed` it stores (stack, in, out).
        parameter: its name there.
        index: the matrix's place in the stack.
    """

    owner: nn.Module

    def __init__(self, owner: nn.Module, parameter: str, index: int):
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self.parameter = parameter
        self.index = index
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # (out, in)
        """A view of the matrix, without a graph."""
        return as_stack(self.owner, getattr(self.owner, self.parameter).detach())[self.index]


def as_stack(
    owner: nn.Module,
    stored: Tensor,  # (stack, out, in), or (stack, in, out)
) -> Tensor:  # (stack, out, in)
    """A stack of weights as its module stores it, or the inverse; a view."""
    return stored.mT if getattr(owner, "is_transposed", False) else stored


def find_backend(base: nn.Module, **quantization_kwargs: Any) -> QuantizationBackend | None:
    """Ours for a layer that adds updates by itself, else PEFT's; None for a layer that is not quantised.

    PEFT's for torchao wants to know how to quantise a merged weight again, which only a model that transformers has
    quantised says. Another one can be trained, and not merged.
    """
    if isinstance(base, AbstractUpdatableLinear):
        return UpdatableBackend()
    known = {"get_apply_tensor_subclass": _cannot_quantize_again, **quantization_kwargs}
    backend = resolve_quantization_backend(base, **known)
    if isinstance(backend, TorchaoBackend) and backend.get_apply_tensor_subclass is _cannot_quantize_again:
        backend.supports_merge = False
    return backend


def _cannot_quantize_again() -> Any:
    raise ValueError(cannot_merge("torchao"))


def cannot_merge(backend_name: str) -> str:
    """Why a layer with such a backend is not merged into, and what to do instead."""
    return (
        f"its weight is quantised by {backend_name}, and a merged one could not be quantised again in the same way. "
        "Keep the adapter beside the model (save_pretrained), or merge it into the model before quantisation; of "
        "torchao, a model that transformers has quantised (TorchAoConfig) can be merged into."
    )


def plain_layer(base: nn.Module, weight: Tensor) -> nn.Module:
    """A frozen layer of the class that a quantised layer was made from, in the weight's dtype.

    Args:
        base: an `nn.Linear` (bitsandbytes' too) or a `Conv1D`; its `source_cls`, if it has one, is what it was.
        weight: (out, in).
    """
    out, in_ = weight.shape
    if getattr(base, "source_cls", type(base)) is Conv1D:
        with torch.device("meta"):
            plain: nn.Module = Conv1D(out, in_)
    else:
        plain = nn.Linear(in_, out, bias=base.bias is not None, device="meta")
    plain.weight = nn.Parameter(as_stored(plain, weight).contiguous(), requires_grad=False)
    if base.bias is not None:
        plain.bias = nn.Parameter(base.bias.detach().to(weight.dtype), requires_grad=False)  # type: ignore[operator]
    return plain.train(base.training)


@contextmanager
def onloaded(base: nn.Module) -> Iterator[None]:
    """While it is open, a layer's tensors are where it computes: accelerate may keep them elsewhere between its calls.

    What was read stays with the reader; what is written is lost.
    """
    is_away = any(parameter.is_meta for parameter in base.parameters(recurse=False))
    with align_module_device(base) if is_away else nullcontext():
        yield


def check_reachable(base: nn.Module, name: str, model: nn.Module) -> None:
    """Raise a `ValueError` if accelerate has put a layer's tensors away, and not by a hook of the layer's own."""
    is_away = any(parameter.is_meta for parameter in base.parameters(recurse=False))
    if is_away and not has_offloaded_params(base) and any("_hf_hook" in vars(module) for module in model.modules()):
        raise ValueError(
            f"{name}: accelerate has put its weight away, to be fetched by a hook of a module around it "
            "(preload_module_classes) or by one of several hooks. An adapter could neither start there nor be merged. "
            "Dispatch the model without preload_module_classes, or load it without offloading."
        )


@contextmanager
def present(base: nn.Module) -> Iterator[None]:
    """As `onloaded`, and the tensors are whole: DeepSpeed's ZeRO-3 leaves each process a part of them.

    Raises:
        ImportError: they are partitioned, and there is no DeepSpeed.
    """
    with onloaded(base):
        if not is_partitioned(base):
            yield
            return
        import deepspeed  # type: ignore

        with deepspeed.zero.GatheredParameters(list(base.parameters(recurse=False))):
            yield


def check_whole(base: nn.Module, name: str) -> None:
    """Raise a `ValueError` if nothing can be written to a layer's weight."""
    if is_partitioned(base):
        raise ValueError(
            f"{name}: ZeRO-3 has left each process a part of its weight; nothing can be merged into that. Save the "
            "adapter (save_pretrained), and merge it into a model that is loaded without ZeRO-3."
        )


def is_partitioned(base: nn.Module) -> bool:
    """Whether ZeRO-3 has left each process a part of the layer's tensors."""
    return any(hasattr(parameter, "ds_shape") for parameter in base.parameters(recurse=False))


def set_innermost(layer: BaseTunerLayer, base: nn.Module) -> None:
    """Put `base` where the innermost layer under an adapter is."""
    while isinstance(layer.base_layer, BaseTunerLayer):  # type: ignore
        layer = layer.base_layer  # type: ignore
    layer.base_layer = base  # type: ignore


def layer_shape(
    base: nn.Module,
    name: str,
    parent: nn.Module | None = None,
    backend: QuantizationBackend | None = None,
    may_be_convolution: bool = False,
) -> tuple[int, int]:  # (out, in)
    """The features of a linear layer: `nn.Linear`, GPT-2's `Conv1D`, or a quantised layer that PEFT has a backend for.

    Or the channels of a convolution, for a method that adapts them.

    Raises:
        ValueError: any other layer, one without a weight yet, or one whose weight the module around it reads without
            calling it.
    """
    if reads_weight_itself(parent, name.rpartition(".")[2]):
        raise ValueError(
            f"{name}: {type(parent).__name__} reads this layer's weight instead of calling the layer, so that an "
            "adapter would have no effect. Remove it from target_modules, or name it in exclude_modules."
        )
    if isinstance(base, Conv1D):
        return base.nf, base.nx  # the weight may be partitioned
    if isinstance(base, nn.LazyLinear):
        raise ValueError(f"{name}: a {type(base).__name__} has no weight yet. Run the model once before it is adapted.")
    if isinstance(base, (nn.Linear, StackedWeight)) or (backend is not None and hasattr(base, "in_features")):
        return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
    if may_be_convolution and is_convolution(base):
        return base.out_channels, base.in_channels  # type: ignore[return-value]
    others = ", or a convolution (torch.nn.Conv1d, Conv2d, Conv3d)" if may_be_convolution else ""
    raise ValueError(
        f"{name}: cannot adapt a {type(base).__name__}, expected a linear layer (torch.nn.Linear, transformers' "
        f"Conv1D, or a quantised linear layer that PEFT supports){others}. Narrow target_modules, or name it in "
        "exclude_modules."
    )


def is_convolution(base: nn.Module) -> bool:
    """Whether it is one of torch's own: a subclass, or a hook (weight_norm), may make something else of its weight."""
    return type(base) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and "weight" in base._parameters


def convolution_of(base: Any) -> Convolution | None:
    """What makes the layer a convolution; None if it is none."""
    if not is_convolution(base):
        return None
    padding, border = base.padding, None
    if base.padding_mode != "zeros":
        padding, border = (
            (0,) * len(base.kernel_size),
            (tuple(base._reversed_padding_repeated_twice), base.padding_mode),
        )
    return Convolution(base.kernel_size, base.stride, padding, base.dilation, base.groups, border)


def with_layer(site: Site, base: nn.Module) -> Site:
    """The site with what only its layer tells: the geometry of a convolution, the order of an expert's rows."""
    rows_alternate = isinstance(base, StackedWeight) and not getattr(base.owner, "is_concatenated", True)
    return replace(site, convolution=convolution_of(base), interleaved=site.interleaved or rows_alternate)


def addable_weight(base: nn.Module) -> Tensor | None:
    """The weight (out, in) where `base(x)` is exactly `F.linear(x, weight, bias)`, as a view; else None.

    None for quantised layers, subclasses, layers with hooks (offloading, DeepSpeed) or a replaced `forward`: their own
    forward must run. None too for a sharded weight (tensor parallel, or FSDP2 of this layer alone), which only its
    module's forward gathers; see `is_gathered` for those that are whole now.
    """
    if type(base) not in (nn.Linear, Conv1D) or has_own_forward(base):
        return None
    weight = base.weight
    plain = (Tensor, nn.Parameter, FakeTensor)  # a fake one stands for a plain one, where a step is only counted
    if not isinstance(weight, Tensor) or type(weight) not in plain or not weight.is_floating_point():
        return None
    return weight.t() if isinstance(base, Conv1D) else weight


def is_gathered(base: nn.Module) -> bool:
    """Whether FSDP puts a module's parameters together for each call, and takes them apart again.

    While the block around it runs they are plain tensors, of which only this note of FSDP's on the module tells.
    """
    return getattr(base, "_is_fsdp_managed_module", False)


def has_own_forward(base: nn.Module) -> bool:
    """Whether calling the layer does more than its class says: hooks, or a replaced `forward`."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return "forward" in base.__dict__ or any(hooks)


def as_matrix(base: nn.Module, stored: Tensor) -> Tensor:
    """A layer's weight, or one laid out like it, as (out, in); a convolution's as (out, in / groups · kernel)."""
    if isinstance(base, Conv1D):
        return stored.t()
    return stored.flatten(1) if is_convolution(base) else stored


def unmerged_weight(base: nn.Module) -> Tensor:
    """The weight of a layer as it stores it, to be put back by `put_weight` after another one was in its place."""
    return base.weight.clone() if isinstance(base, StackedWeight) else base.weight.data  # type: ignore[return-value]


def put_weight(base: nn.Module, weight: Tensor) -> None:
    """Give a layer that is not quantised another weight, laid out as it stores its own."""
    if isinstance(base, StackedWeight):
        with torch.inference_mode(base.weight.is_inference()):
            base.weight.copy_(weight)
    else:
        base.weight.data = weight


def weight_of(layer: nn.Module) -> Tensor:  # (out, in)
    """The weight of a layer that adapts nothing, without a graph."""
    return as_matrix(layer, layer.weight.detach())  # type: ignore[arg-type]


def as_stored(base: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of `as_matrix`."""
    if isinstance(base, Conv1D):
        return matrix.t()
    if not is_convolution(base):
        return matrix
    weight: Any = base.weight
    return matrix.view(getattr(weight, "ds_shape", weight.shape))  # of one that ZeRO-3 has partitioned


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
