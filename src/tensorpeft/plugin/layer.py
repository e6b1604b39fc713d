"""The one layer: a frozen linear layer, or convolution, and the updates of its adapters. It knows no method."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend, quantization_extra_repr
from torch import Tensor, nn

from tensorpeft.networks.dtypes import product_dtype
from tensorpeft.networks.effective import effective_linear, effective_weight
from tensorpeft.networks.low_rank import low_rank_linear, low_rank_rows
from tensorpeft.networks.update import (
    AbstractFactoredUpdate,
    AbstractFusedUpdate,
    AbstractLowRankUpdate,
    AbstractOutputUpdate,
    AbstractUpdatableLinear,
    AbstractUpdate,
    AbstractWeightUpdate,
    stacked_factors,
)
from tensorpeft.networks.versions import Kept, can_compare, version_of
from tensorpeft.plugin.base_weight import (
    StackedWeight,
    UpdatableBackend,
    addable_weight,
    as_matrix,
    as_stored,
    has_own_forward,
    is_convolution,
    is_gathered,
    present,
    put_weight,
    restore_row_order,
    set_innermost,
    unmerged_weight,
)
from tensorpeft.plugin.direct_reads import uncalled
from tensorpeft.plugin.holder import UpdateHolder
from tensorpeft.plugin.routes import Route, choose_route

# From so many adapters in a batch on, their factors are gathered per row instead of looping over the adapters.
_GATHERED_ADAPTERS = 4


class TensorLayer(UpdateHolder):
    """`y = base(x) + Σ update(x)` over the active adapters, or `+ Σ update(base(x))` of a network behind the layer.

    Args:
        base_layer: the layer to adapt.
        shape: (out, in) of its weight.
        quantization_backend: PEFT's, if the base is quantised.
        name: its full name in the model.
        owns_base: whether no other adapter's layer was below this one when it was made, nor beside it (PeftMixedModel).
            Such a one may merge into the weight as well: nothing is cached then, and unmerging subtracts.

    The base weight is changed by merging only, and `unmerge` puts the very tensor back. A merged or cached weight is
    `networks.effective.effective_weight`, so that merged and unmerged inference multiply by the same numbers. Where
    nothing can be cached, an update that is cheaper beside the base (`is_cheaper_apart`) is applied there, and equals
    the merged one up to rounding.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        shape: tuple[int, int],  # (out, in)
        name: str,
        quantization_backend: QuantizationBackend | None = None,
        owns_base: bool = True,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape
        self.name = name
        self.quantization_backend = quantization_backend
        self.owns_base = owns_base
        # While adapters are merged: the base's own tensor, or the layer itself where a plain one stands in its place.
        self._unmerged: Tensor | AbstractUpdatableLinear | None = None
        self._merged_sample: list[Tensor] = []  # of the weight that merging has made
        self._cached: Kept[Tensor] = Kept()  # the effective weight
        # What a model, or another adapter, reads of a convolution.
        if is_convolution(base := self.get_base_layer()):
            for constant in base.__constants__:  # type: ignore[union-attr]
                if hasattr(base, constant) and not hasattr(self, constant):
                    setattr(self, constant, getattr(base, constant))

    @property
    def weight(self) -> Tensor:
        """The base weight as it is, for who asks about it; who would compute with it past an adapter gets an error."""
        weight = super().weight
        adds_nothing = self.merged or self.disable_adapters or not self._named(self.active_adapters)
        return weight if adds_nothing else uncalled(weight, self.name)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(*batch, in) -> (*batch, out). `adapter_names`: one per row of the batch, "__base__" for none."""
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        return self._adapted_forward(x, self.unmerged_updates(), *args, **kwargs)

    def unmerged_updates(self) -> list[AbstractUpdate]:
        """What the active adapters add to the base weight as it is; disabled ones that are merged are unmerged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return [] if self.disable_adapters or self.merged else self._named(self.active_adapters)

    def _adapted_forward(
        self, x: Tensor, updates: Sequence[AbstractUpdate], *args: Any, may_cache: bool = True, **kwargs: Any
    ) -> Tensor:
        weight = addable_weight(self.base_layer) if updates else None
        is_updatable = isinstance(self.base_layer, AbstractUpdatableLinear) and not has_own_forward(self.base_layer)
        fused = [update for update in updates if isinstance(update, AbstractFusedUpdate)]
        low_rank = [update for update in updates if isinstance(update, AbstractLowRankUpdate)]
        trains = self.training or needs_gradients(weight, fused)
        rows = x.numel() // max(x.shape[-1], 1)
        stays = self.owns_base and not is_gathered(self.base_layer)
        route = choose_route(
            is_addable=weight is not None,
            is_updatable=is_updatable,
            has_fused=bool(fused),
            has_low_rank=bool(low_rank),
            may_keep=may_cache and stays and not trains and can_compare(x),
            is_cheaper_apart=all(update.is_cheaper_apart(rows) for update in fused),
        )
        bias: Any = self.base_layer.bias if weight is not None else None
        joined: Sequence[AbstractUpdate] = fused
        if route is Route.UPDATABLE:
            result = self.base_layer.forward_with(x, [update.cut() for update in fused])  # type: ignore[operator]
        elif route is Route.KEPT_SUM:
            assert weight is not None
            dtype = product_dtype(x)
            result = F.linear(x, self._cached_weight(weight, fused, dtype), None if bias is None else bias.to(dtype))
        elif route is Route.SUM:
            result = effective_linear(x, weight, bias, [update.cut() for update in fused])
        elif route is Route.LOW_RANK:
            joined = low_rank
            result = low_rank_linear(x, weight, bias, [update.pair(product_dtype(x)) for update in low_rank])
        else:
            joined = ()
            result = self.base_layer(x, *args, **kwargs)
        return self._add(result, x, [update for update in updates if update not in joined])

    def _add(self, result: Tensor, x: Tensor, updates: Sequence[AbstractUpdate]) -> Tensor:
        """What the base made of x, with what these updates add."""
        if updates and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        output = result
        for update in updates:
            added = update(output if isinstance(update, AbstractOutputUpdate) else x)
            result = result + added.to(result.dtype)
        return result

    def _cached_weight(self, weight: Tensor, updates: Sequence[AbstractFusedUpdate], dtype: torch.dtype) -> Tensor:
        """The effective weight of these updates, made anew when what it is made of has changed."""

        def make() -> Tensor:
            return effective_weight(weight, [update.cut() for update in updates], dtype)

        version = version_of([weight])
        if version is None:
            return make()
        return self._cached.get(make, *compared(weight, updates), version, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorLayer:
        """As torch's; what merging has put aside moves, and is cast, with the rest."""
        super()._apply(fn, recurse)
        if isinstance(self._unmerged, Tensor):
            self._unmerged = fn(self._unmerged)
        elif self._unmerged is not None:
            self._unmerged._apply(fn)
        self._merged_sample = [fn(part) for part in self._merged_sample]
        self._cached.clear()
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the cached weight, which is one with this adapter, goes."""
        self._cached.clear()
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> TensorLayer:
        """As torch's; the cached weight goes, so that training and a new evaluation start from what is there."""
        self._cached.clear()
        return super().train(mode)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each row with its own adapter; written for inference.

        The rows of an adapter share one product, or, of many adapters of one shape, every row has its own factors
        (`benchmarks/mixed_batch.py`).
        """
        if len(x) != len(adapter_names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged are: {', '.join(self.merged_adapters)}."
            )
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        result = result.clone()
        names = [name for name in dict.fromkeys(adapter_names) if name in self.updates]
        factors = stacked_factors(self._named(names)) if len(names) >= _GATHERED_ADAPTERS else None
        if factors is not None:
            places = [(k, names.index(name)) for k, name in enumerate(adapter_names) if name in names]
            rows, adapters = torch.tensor(places, device=x.device).unbind(1)
            return result.index_add_(0, rows, low_rank_rows(x[rows], factors, adapters).to(result.dtype))
        for name in names:
            rows = torch.tensor([k for k, other in enumerate(adapter_names) if other == name], device=x.device)
            (update,) = self._named([name])
            if isinstance(update, AbstractFactoredUpdate):
                result.index_add_(0, rows, update(x[rows]).to(result.dtype))
            elif isinstance(update, AbstractOutputUpdate):
                result[rows] = self._add(result[rows], x[rows], [update])
            else:  # by the route that it takes when it is alone: equal results
                result[rows] = self._adapted_forward(x[rows], [update], *args, may_cache=False, **kwargs)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters' updates into the base weight.

        Raises:
            ValueError: with `safe_merge`, the merged weight would not be finite; nothing has been changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.updates]
        if not names:
            return
        self._forget_what_was_overwritten()
        merged = self.merged_weight(names)
        if safe_merge:
            check_finite(merged, names)
        base = self.get_base_layer()
        if self.owns_base and not self.merged and isinstance(base, AbstractUpdatableLinear):
            object.__setattr__(self, "_unmerged", base)  # not as a submodule
        elif self.owns_base and not self.merged and self.quantization_backend is None:
            self._unmerged = unmerged_weight(base)
        self.set_base_weight(merged)
        if isinstance(self._unmerged, Tensor):
            self._merged_sample = [part.clone() for part in diagonals(self.read_base_weight())]
        self.merged_adapters.extend(names)
        self._cached.clear()

    def _forget_what_was_overwritten(self) -> None:
        """Put no tensor back over what another adapter, or anybody, has written to the merged weight since."""
        if isinstance(self._unmerged, Tensor):
            now = diagonals(self.read_base_weight())
            same = [(old == new) | (old.isnan() & new.isnan()) for old, new in zip(self._merged_sample, now)]
            if not all(part.all() for part in same):
                self._unmerged = None

    @torch.no_grad()
    def merged_weight(self, adapter_names: Sequence[str]) -> Tensor:
        """The base weight with the given adapters, beside any merged already, as the base layer stores it."""
        names, base = list(adapter_names), self.get_base_layer()
        if self._unmerged is not None:  # one rounding from the pretrained weight, however many merges
            names = [*self.merged_adapters, *names]
        cuts = [self._weight_update(name).cut() for name in names]
        source = base if self._unmerged is None else self._unmerged
        if isinstance(source, AbstractUpdatableLinear):
            return as_stored(base, source.weight_with(cuts, self.quantization_backend.dtype))  # type: ignore[union-attr]
        weight = as_matrix(base, source) if isinstance(source, Tensor) else self.read_base_weight()
        return as_stored(base, effective_weight(weight, cuts, weight.dtype))

    def read_base_weight(self) -> Tensor:  # (out, in)
        """The base weight as it is now, dequantised if need be; a view where it can be."""
        with present(base := self.get_base_layer()):
            restore_row_order(base)
            return as_matrix(base, self.get_base_weight())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out again: bit for bit, unless the base is quantised, shared with a method, or was
        written to since.
        """
        if not self.merged:
            return
        self._forget_what_was_overwritten()
        if isinstance(self._unmerged, Tensor):
            put_weight(self.get_base_layer(), self._unmerged)
        elif self._unmerged is not None:
            set_innermost(self, self._unmerged)
        else:
            weight = self.read_base_weight()
            for name in self.merged_adapters:
                weight = weight - self._weight_update(name).matrix().to(weight)
            self.set_base_weight(as_stored(self.get_base_layer(), weight))
        object.__setattr__(self, "_unmerged", None)
        self._merged_sample = []
        self.merged_adapters.clear()
        self._cached.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter in float32, laid out as the base layer stores its weight."""
        return as_stored(self.get_base_layer(), self._weight_update(adapter).matrix())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether W' = W + ΔW. A ΔW of high rank converts with an error, by the rank given to PEFT."""
        # PEFT asks a layer without a name, whatever its adapter's is; and its conversion knows matrices only.
        updates = self._named([adapter_name]) or self.updates.values()
        are_weights = all(isinstance(update, AbstractWeightUpdate) for update in updates)
        base = self.get_base_layer()
        return are_weights and not is_convolution(base) and not isinstance(base, StackedWeight)

    def _weight_update(self, adapter_name: str) -> AbstractWeightUpdate:
        return check_weight_update(adapter_name, self.updates[adapter_name])

    def _named(self, adapter_names: Sequence[str]) -> list[AbstractUpdate]:
        return [self.updates[name] for name in adapter_names if name in self.updates]  # type: ignore[misc]

    def extra_repr(self) -> str:
        """The quantisation backend, if any."""
        return quantization_extra_repr(self)


def check_weight_update(adapter_name: str, update: nn.Module) -> AbstractWeightUpdate:
    """The update, if it is one of the layer's weight.

    Raises:
        ValueError: it is a network behind the layer.
    """
    if not isinstance(update, AbstractWeightUpdate):
        raise ValueError(
            f"the adapter {adapter_name!r} is a non-linear network behind the layer, not an update of its weight: it "
            "cannot be merged, exported or converted, there is no delta weight, and nothing else can be merged while "
            "it is active. Keep it beside the model (save_pretrained), or deactivate it first (set_adapter)."
        )
    return update


def check_finite(weight: Tensor, adapter_names: Sequence[str]) -> None:
    """Raise a `ValueError` that names the adapters if any element of a merged weight is not finite."""
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken: check "
            "its checkpoint and the loss it was trained to."
        )


def needs_gradients(weight: Tensor | None, updates: Sequence[AbstractUpdate]) -> bool:
    """Whether a gradient of the weight or of the updates will be asked for."""
    modules = dict.fromkeys(module for update in updates for module in (update, update.shared) if module is not None)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*parameters, weight) if t is not None)


def compared(weight: Tensor, updates: Sequence[AbstractUpdate]) -> tuple[list[Tensor], object]:
    """What tells, beside torch's count, whether a sum of these is as it was: numbers, and an object for all others.

    Of the weight, which is too large to be compared, a sample; what updates share is compared once.
    """
    own = [t for update in updates for t in (*update.parameters(), *update.buffers()) if t.is_floating_point()]
    shared = dict.fromkeys(update.shared for update in updates if update.shared is not None)
    which = [weakref.ref(update) for update in updates]  # equal numbers may be scaled in other ways
    return [*diagonals(weight), *own], (which, [factors.numbers() for factors in shared])


def layers_of(model: nn.Module) -> list[TensorLayer]:
    """Our adapted layers."""
    return [module for module in model.modules() if isinstance(module, TensorLayer)]


@contextmanager
def merging_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """While it is open, layers that are made plain by merging get this dtype; those merged before are merged anew."""
    layers = [
        layer
        for layer in layers_of(model)
        if dtype is not None and isinstance(layer.quantization_backend, UpdatableBackend)
    ]
    backends = [layer.quantization_backend for layer in layers]
    for layer, backend in zip(layers, backends):
        backend.dtype = dtype  # type: ignore[union-attr]
        if layer.merged:
            names = list(layer.merged_adapters)
            layer.unmerge()
            layer.merge(adapter_names=names)
    try:
        yield
    finally:
        for backend in backends:
            backend.dtype = None  # type: ignore[union-attr]


def diagonals(weight: Tensor) -> list[Tensor]:
    """Views that have an entry of every row and of every column: of the square blocks side by side, and of the rest."""
    wide = weight if weight.shape[-2] <= weight.shape[-1] else weight.mT
    rows, columns = wide.shape[-2:]
    whole = columns // rows * rows
    blocks = wide[..., :whole].unflatten(-1, (-1, rows))
    return [blocks.diagonal(0, -3, -1), wide[..., whole:].diagonal(0, -2, -1)]
