"""The whole contract of an update at one layer: what it adds to the output, and the matrix it is, if it is one."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensorpeft.networks.cut import Cut, fold
from tensorpeft.networks.derivatives import is_transformed
from tensorpeft.networks.dtypes import at_least_float32, product_dtype, without_autocast
from tensorpeft.networks.effective import add_apart, effective_linear
from tensorpeft.networks.group import Parts, Place, Tensors, parts_of, tensors_of
from tensorpeft.networks.low_rank import MATRIX_PRODUCT, PAIR_PRODUCT, Factors, Pair, low_rank_linear
from tensorpeft.networks.nested import GradientsOnce
from tensorpeft.networks.versions import Kept

if TYPE_CHECKING:
    from typing_extensions import Self

# The buffer that an update has where a part of it is stored in the base layer: which base that must be.
BASE_DIGEST = "base_digest"


def keeping_dtype(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` may do to tensors that must keep their very numbers: move them, not cast them."""

    def move(tensor: Tensor) -> Tensor:
        moved = function(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def keeping_precision(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` may do to an update that is a difference: not round its numbers to 16 bits."""

    def move(tensor: Tensor) -> Tensor:
        moved = function(tensor)
        is_rounded = moved.is_floating_point() and at_least_float32(moved) is not moved
        return tensor.to(moved.device) if is_rounded else moved

    return move


class AbstractDifference(nn.Module, ABC):
    """Parameters that are worth their difference to where they started, of which 16 bits would leave little.

    A cast of the module leaves them in float32, unless `may_round` is set. What somebody else has rounded there, as TRL
    rounds all that is trained on a base in 4 bits, is put back when training begins.
    """

    may_round: bool = False

    @abstractmethod
    def starts(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Each parameter beside its start, of the same shape, in float32 or float64; nothing where there is none."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's, but for the rounding."""
        rounds = self.may_round or not any(True for _ in self.starts())
        return super()._apply(fn if rounds else keeping_precision(fn), recurse)  # pyright: ignore[reportUnknownMemberType]

    @torch.no_grad()
    def train(self, mode: bool = True) -> Self:
        """As torch's; parameters that stand at their start, rounded, are at their start again."""
        for parameter, start in self.starts() if mode and not self.may_round else ():
            is_rounded = at_least_float32(parameter) is not parameter
            if is_rounded and parameter.shape == start.shape and not (parameter.is_meta or start.is_meta):
                _put_back(parameter, start)
        return super().train(mode)


def _put_back(parameter: Tensor, start: Tensor) -> None:
    if torch.equal(parameter, start.to(parameter)):
        parameter.data = start.to(parameter.device, copy=True)
        return
    warnings.warn(
        f"trained numbers were rounded to {str(parameter.dtype).removeprefix('torch.')}, which leaves little of an "
        "update that is the difference to a start. TRL's trainers do so on a base in 4 or 8 bits: pass them a new "
        "adapter (peft_config), or load a trained one after the trainer is made.",
        UserWarning,
        stacklevel=3,
    )


class AbstractUpdate(nn.Module, ABC):
    """What an adapter adds at one layer.

    Parameters are trained; buffers are saved beside them and frozen. Both are registered under plain names
    (`core_1`, not `cores.0`): PEFT takes the adapter's name out of a checkpoint key one level above the tensor.

    Args:
        shared: the module that owns the factors which this update shares with others of its adapter. Not a submodule
            of this one: its parameters are registered, saved and trained once, by whoever holds the updates.
    """

    shared: SharedFactors | None
    place: Place | None = None  # in a group of updates that are made together, by `networks.group.join`

    def __init__(self, shared: SharedFactors | None = None):
        super().__init__()
        object.__setattr__(self, "shared", shared)

    def train(self, mode: bool = True) -> Self:
        """As torch's; what a group keeps goes."""
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's; what a group keeps goes."""
        self._forget()
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]  # torch's own has no types

    def _forget(self) -> None:
        if self.place is not None:
            self.place.group.clear()

    @abstractmethod
    def tensor_name(self) -> str:
        """What tells a person which tensor the layer belongs to: equal for layers of one, or of equal ones."""


class AbstractWeightUpdate(AbstractUpdate):
    """ΔW of one weight (out, in), added to a frozen W0: `y = x W0ᵀ + update(x)`.

    The weight of a convolution is read as a matrix too, (out, in / groups · kernel); its update is a convolution.
    """

    # Whether what `cut` subtracts is an orthogonal projection of W0, so that a checkpoint shows which W0 it is for.
    starts_at_projection: bool = False

    @abstractmethod
    def forward(
        self,
        x: Tensor,  # (*batch, in)
    ) -> Tensor:  # (*batch, out)
        """`x ΔWᵀ`, in the dtype of x."""

    @abstractmethod
    def cut(self) -> Cut:
        """ΔW as a network that can be cut in two.

        A matrix product A B of rank r has the halves (out, 1, r) and (r, 1, in).
        """

    def start_matrix(self) -> Tensor | None:  # (out, in)
        """What is subtracted, as a matrix; None where nothing is."""
        return None

    # Not `weight`: whoever walks a model, as PEFT's policy for FSDP does, takes a module's `weight` for a tensor.
    def matrix(self) -> Tensor:  # (out, in)
        """ΔW: the matrix that `forward` multiplies by, by the plain formula. Differentiable."""
        cut = self.cut()
        update = fold(cut.network.halves(cut.cores))
        return update - fold(cut.network.halves(cut.start)) if cut.start else update


class AbstractOutputUpdate(AbstractUpdate):
    """A small network behind a frozen layer: `y = z + update(z)` for the layer's output z. Not linear: it has no ΔW."""

    @abstractmethod
    def forward(
        self,
        z: Tensor,  # (*batch, out)
    ) -> Tensor:  # (*batch, out)
        """What is added to the layer's output, in its dtype."""


class AbstractUpdatableLinear(nn.Module, ABC):
    """A frozen linear layer that stores its weight in a form of its own, and by itself adds updates to it.

    A part of the weight, its `start`, may be tensors at which an update of a layer like it starts.

    Its forward is `forward_with(x, ())`, and `forward_with` multiplies by `weight_with(cuts, x.dtype)`, so that an
    update of zero changes nothing.
    """

    start: nn.Module | None

    @abstractmethod
    def forward_with(
        self,
        x: Tensor,  # (*batch, in)
        cuts: Sequence[Cut],
    ) -> Tensor:  # (*batch, out)
        """`x (W + Σ ΔW)ᵀ + b`."""

    @abstractmethod
    def weight_with(
        self,
        cuts: Sequence[Cut],
        dtype: torch.dtype | None = None,  # None: that of the model around it
    ) -> Tensor:  # (out, in)
        """`W + Σ ΔW` as a matrix."""

    @abstractmethod
    def current_digest(self) -> Tensor:  # as `BASE_DIGEST`
        """The digest of all that the weight, start included, is made of now."""


class SharedFactors(nn.Module):
    """The factors that the updates of one adapter share. Their owner registers them once.

    Parameters are trained; buffers are frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradients = GradientsOnce()
        self._numbers: Kept[object] = Kept()

    def tensors(self) -> Mapping[str, Tensor]:
        """Its parameters and buffers by name, or what takes their gradients for them now (`GradientsOnce`)."""
        tensors = tensors_of(self)
        return tensors if torch.compiler.is_compiling() else self.gradients.tensors(tensors)

    def numbers(self) -> object:
        """The same object for as long as its tensors hold the same numbers."""
        return self._numbers.get(object, list(tensors_of(self).values()))


class AbstractFusedUpdate(AbstractWeightUpdate):
    """An update of high rank: a layer adds it to the base weight and multiplies once (`networks.effective`)."""

    @abstractmethod
    def is_cheaper_apart(self, rows: int) -> bool:
        """Whether so many rows are faster with `forward` beside the base than with a sum made for them alone."""


class AbstractSummedUpdate(AbstractFusedUpdate):
    """One that is worth nothing but the sum: to take x through its tensors costs more, or is not possible."""

    def is_cheaper_apart(self, rows: int) -> bool:
        """Never."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """`x ΔWᵀ` for a base whose weight cannot be added to: half by half for few rows, else through the fused map."""
        cut = self.cut()
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed()):
            x = x.to(product_dtype(x))
            if (added := add_apart(x, [cut])) is not None:
                return added.to(x.dtype)
        return effective_linear(x, None, None, [cut])


class AbstractFactoredUpdate(AbstractWeightUpdate):
    """A LoRA with structured factors: what can be exported as one."""

    @abstractmethod
    def factors(self) -> Factors:
        """The three factors, in the parameters' dtype. Differentiable."""

    def cut(self) -> Cut:
        """The halves `up · core` and `down`."""
        return Cut(MATRIX_PRODUCT, self.factors())


class AbstractLowRankUpdate(AbstractFactoredUpdate):
    """A factored update of a linear layer: two thin products beside the base weight's (`networks.low_rank`)."""

    @abstractmethod
    def factors_from(self, tensors: Mapping[str, Tensor]) -> Factors:
        """The three factors made of these tensors, named as the parameters and buffers (shared ones, its own) are.

        Where every tensor has one more leading axis, of the members of a group, so have the factors. What else they
        depend on, as a scale, is an attribute of the update, and part of its group's key.
        """

    def factors(self) -> Factors:
        """Those of its own tensors and the shared ones."""
        shared = {} if self.shared is None else tensors_of(self.shared)
        tensors = {**shared, **tensors_of(self)}
        with without_autocast(next(iter(tensors.values())).device):
            return self.factors_from(tensors)

    def pair(
        self,
        dtype: torch.dtype | None = None,  # None: the parameters'
    ) -> Pair:
        """What the layer multiplies by. Differentiable."""
        return Pair(*parts_of(self, dtype))

    def cut(self) -> Cut:
        """The two halves that the layer multiplies by."""
        return Cut(PAIR_PRODUCT, self.pair())

    def group_key(self) -> Hashable | None:
        """As `networks.group.Member` has it; None, where a method says no other: the update is made alone."""
        return None

    def make_parts(
        self, members: Sequence[Any], own: Sequence[Tensors], shared: Tensors, dtype: torch.dtype | None
    ) -> list[Parts]:
        """The pairs of factors: of tensors that are stacked, where there are several with no shared ones."""
        if len(members) == 1:
            return [_cast(self.factors_from({**shared, **own[0]}).pair(), dtype)]
        assert not shared
        pair = self.factors_from({name: torch.stack([tensors[name] for tensors in own]) for name in own[0]}).pair()
        return list(zip(*(factor.unbind() for factor in _cast(pair, dtype))))

    def forward(self, x: Tensor) -> Tensor:
        """`x downᵀ upᵀ`; under autocast in its dtype."""
        return low_rank_linear(x, None, None, [self.pair(product_dtype(x))])


class AbstractSummableUpdate(AbstractLowRankUpdate):
    """One of the updates of shared factors whose linear combinations have the same form, at the sum of their ranks."""

    @abstractmethod
    def sum_shared(
        self,
        others: Sequence[Any],  # updates of the same weight, of other adapters
        weights: Sequence[float],  # this one's first
    ) -> dict[str, Tensor]:
        """The tensors of the shared factors of `Σ_k weights[k] · ΔW_k` of all weights, for updates that scale nothing.

        Raises:
            ValueError: the others' factors are for other weights, or have another form.
        """


def _cast(pair: Pair, dtype: torch.dtype | None) -> Pair:
    return pair if dtype is None else Pair(*(factor.to(dtype) for factor in pair))


@torch.no_grad()
def stacked_factors(updates: Sequence[AbstractUpdate]) -> Factors | None:
    """The factors of one weight's updates in several adapters, each stacked along a leading axis.

    None where they cannot be: not all of low rank, or of different ranks.
    """
    factors = [update.factors() for update in updates if isinstance(update, AbstractLowRankUpdate)]
    forms = {tuple((factor.shape, factor.dtype) for factor in each) for each in factors}
    if len(factors) < len(updates) or len(forms) > 1:
        return None
    return Factors(*(torch.stack(each) for each in zip(*factors)))
