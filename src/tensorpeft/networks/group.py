"""What the updates of many weights need, made for all at once: few operations, once per pass of training."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from tensorpeft.networks.derivatives import gradients, is_transformed
from tensorpeft.networks.dtypes import without_autocast
from tensorpeft.networks.versions import version_of

# Larger groups save no more time, and keep the gradients of more weights until the last of them is there.
_MAX_MEMBERS = 32

# What an update hands to the map that applies it. Some have a gradient; the others are constants.
Parts = tuple[Tensor, ...]
Tensors = Mapping[str, Tensor]


class Member(Protocol):
    """An update that may be one of a group: a module with tensors of its own, and perhaps shared ones."""

    shared: Any  # the module that owns those
    training: bool
    place: Place | None

    def group_key(self) -> Hashable | None:
        """Updates of one key are made together; None: this one is made alone."""
        ...

    def make_parts(
        self, members: Sequence[Any], own: Sequence[Tensors], shared: Tensors, dtype: torch.dtype | None
    ) -> list[Parts]:
        """The parts of each member, from its own tensors and the shared ones. Differentiable."""
        ...


class Place(NamedTuple):
    """Where in which group an update is."""

    group: Group
    number: int


M = TypeVar("M", bound=Member)


def join(updates: Mapping[str, M]) -> Mapping[str, M]:
    """The same updates, those of one key now in groups."""
    by_key: dict[Hashable, list[M]] = {}
    for update in updates.values():
        if (key := update.group_key()) is not None:
            by_key.setdefault(key, []).append(update)
    for members in by_key.values():
        for first in range(0, len(members), _MAX_MEMBERS):
            together = members[first : first + _MAX_MEMBERS]
            group = Group(len(together))
            for index, member in enumerate(together):
                member.place = Place(group, index)
                group.admit(index, member)
    return updates


def parts_of(
    member: Member,
    dtype: torch.dtype | None = None,  # that they are wanted in; None: in that of their computation
) -> Parts:
    """The parts of an update: in training read from its group, if it has one. Differentiable.

    In evaluation they are made alone, whenever they are asked for: what others wrote in between is seen, however they
    did, and nothing says where a pass over parts of a model ends.
    """
    # A compiler fuses what lies in its graph.
    if member.place is None or not member.training or torch.compiler.is_compiling() or is_transformed():
        return _make([member], dtype)[0]
    return member.place.group.parts(member.place.number, member, dtype)


class Group:
    """Updates whose parts are made together, at the first question of a pass over the model.

    A pass ends when a backward pass has come by, or a member asks again outside of one: what is kept is then made anew.
    So the parts are those of the tensors as they are, whoever has written to them and how; forward, backward and what
    checkpointing computes again read the same ones. (What is written through `.data` after a pass that no backward
    followed is seen by members that it had not asked when one that it had is asked again.)

    Members know their group; it refers to them weakly. The members of a copied model have a group of their own.

    Args:
        size: the number of members.
    """

    def __init__(self, size: int):
        self._members: list[Callable[[], Member | None]] = [_nobody] * size
        self._made: _Made | None = None
        self._is_over = False  # the pass that what is made belongs to

    def admit(self, index: int, member: Member) -> None:
        """From now on this is the one at that place."""
        self._members[index] = weakref.ref(member)

    def parts(self, index: int, member: Member, dtype: torch.dtype | None) -> Parts:
        """Those of the member at a place."""
        known = self._members[index]()
        if known is None:
            self.admit(index, member)
        version = _version(member, dtype)
        if known not in (None, member) or version is None:  # a replica of it; or a tensor that does not tell of changes
            return _make([member], dtype)[0]
        needs_grad, made = _needs_grad(member), self._made
        is_current = made is not None and made.versions.get(index) == version
        if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage]
            # Computed again for the backward pass of a checkpoint.
            self.end()
            if made is None or not is_current:
                return _make([member], dtype)[0]
            if needs_grad and not made.asked.get(index):
                # It ran without a graph ("reentrant"), and every block has a backward pass of its own: that must not
                # walk a graph that the blocks share. So this member's own, in the company that gave the forward's bits.
                members = {k: company for k in made.parts if (company := self._members[k]()) is not None}
                return _make(list(members.values()), dtype, member)[list(members).index(index)]
        elif (
            made is None
            or self._is_over
            or not is_current
            or index in made.asked
            or (needs_grad and not made.needs_grad)
        ):
            self._made = None  # free the old one first
            made = self._made = self._make(member, dtype)
        made.asked.setdefault(index, needs_grad)
        return made.parts[index] if needs_grad else tuple(part.detach() for part in made.parts[index])

    def _make(self, asker: Member, dtype: torch.dtype | None) -> _Made:
        """Of all members that can be made together with this one now."""
        layout, members = _layout(asker), dict[int, Member]()
        for index, known in enumerate(self._members):
            if (member := known()) is not None and _layout(member) == layout:
                members[index] = member
        versions = {index: _version(member, dtype) for index, member in members.items()}
        parts = _make(list(members.values()), dtype, group=self)
        self._is_over = False
        return _Made(versions, dict(zip(members, parts)), any(map(_needs_grad, members.values())), {})

    def end(self) -> None:
        """The pass is over: its parts are for backward alone."""
        self._is_over = True

    def clear(self) -> None:
        """Keep nothing."""
        self._made = None

    def __getstate__(self) -> tuple[int, dict[int, Member]]:
        """What a copy, or a pickle, is made of: the members, whose copies become its members. Nothing that is kept."""
        known = {number: member for number, known in enumerate(self._members) if (member := known()) is not None}
        return len(self._members), known

    def __setstate__(self, state: tuple[int, dict[int, Member]]) -> None:
        """As it was written."""
        size, members = state
        self.__init__(size)
        for number, member in members.items():
            self.admit(number, member)


class _Made(NamedTuple):
    """What one pass reads. By the members' indices."""

    versions: Mapping[int, object]
    parts: Mapping[int, Parts]
    needs_grad: bool
    asked: dict[int, bool]  # who has asked; whether with a graph


def _nobody() -> None:
    return None


def tensors_of(module: object) -> dict[str, Tensor]:
    """A module's own parameters and buffers by name, digests apart."""
    attributes = vars(module)
    # FSDP's views, and nn.DataParallel's copies, stand in for parameters as plain attributes.
    named = {**attributes["_parameters"], **attributes["_buffers"], **attributes}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor) and tensor.is_floating_point()}


def _all_tensors(member: Member) -> list[Tensor]:
    shared = {} if member.shared is None else tensors_of(member.shared)
    return [*tensors_of(member).values(), *shared.values()]


def _version(member: Member, dtype: torch.dtype | None) -> object | None:
    tensors = _all_tensors(member)
    version = version_of(tensors)
    if version is None:
        return None
    return version, [tensor.requires_grad for tensor in tensors], dtype, torch.is_inference_mode_enabled()


def _needs_grad(member: Member) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _all_tensors(member))


def _layout(member: Member) -> object:
    """Equal where tensors can be stacked: FSDP leaves those of other blocks sharded, offloading elsewhere."""
    tensors = tensors_of(member)
    forms = [(name, type(t), t.shape, t.dtype, t.device) for name, t in tensors.items()]
    return forms, id(member.shared)


def _make(
    members: Sequence[Member],
    dtype: torch.dtype | None,
    only: Member | None = None,
    group: Group | None = None,  # that keeps them, and ends when a backward pass comes by
) -> list[Parts]:
    """The parts of all members, with a graph of all; or of only one, and of what is shared."""
    first = members[0]
    own = [tensors_of(member) for member in members]
    shared: Tensors = {} if first.shared is None else first.shared.tensors()
    if only is not None:
        own = [tensors if member is only else _detached(tensors) for member, tensors in zip(members, own)]
    device = next(tensor.device for named in (*own, shared) for tensor in named.values())
    if torch.compiler.is_compiling() or is_transformed() or not any(map(_needs_grad, members)):
        with without_autocast(device):
            return first.make_parts(members, own, shared, dtype)

    make = _making(members, [list(named) for named in own], list(shared), dtype, group)
    tensors = [*(tensor for named in own for tensor in named.values()), *shared.values()]
    end = _nobody if group is None else _ending(group)
    flat = cast("Sequence[Tensor]", cast("Any", _Together).apply(make, end, len(own[0]), *tensors))
    count = len(flat) // len(members)
    return [tuple(flat[k : k + count]) for k in range(0, len(flat), count)]


# What follows is kept by the graph of the parts. The parts are kept by their group, which is the members': a strong
# reference to one of these would keep the members for good, as Python sees no cycle through autograd.


def _making(
    members: Sequence[Member],
    own: Sequence[Sequence[str]],  # names of each member's tensors
    shared: Sequence[str],  # of the shared ones
    dtype: torch.dtype | None,
    group: Group | None,
) -> Callable[[Sequence[Tensor]], list[Parts]]:
    """The map from the tensors to the parts.

    Raises:
        RuntimeError: it is called (again, for a second derivative) when the group's members are gone.
    """
    held = members if group is None else ()  # a replica may be gone by then, and nobody keeps what is made of it
    known = [weakref.ref(member) for member in members]

    def make(tensors: Sequence[Tensor]) -> list[Parts]:
        there = held or [member for each in known if (member := each()) is not None]
        if len(there) < len(known):
            raise RuntimeError(
                "backward(create_graph=True) through an adapter that is gone: keep the model, and the adapter in it, "
                "until the gradients are there."
            )
        rest = iter(tensors)
        mine = [{name: next(rest) for name in names} for names in own]
        with without_autocast(tensors[0].device):
            return there[0].make_parts(there, mine, {name: next(rest) for name in shared}, dtype)

    return make


def _ending(group: Group) -> Callable[[], None]:
    known = weakref.ref(group)

    def end() -> None:
        if (group := known()) is not None:
            group.end()

    return end


def _detached(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


class _Together(torch.autograd.Function):
    """The parts of all members from all tensors, with a graph that is neither seen nor freed by those around it.

    What is saved here for backward is no business of the checkpoint, or the like, within which a pass has begun. And
    several backward passes may each come by with some of the members' gradients, as those of separate weights could:
    members without one get none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        make: Callable[[Sequence[Tensor]], list[Parts]],
        end: Callable[[], None],
        num_own: int,  # tensors of each member
        *tensors: Tensor,  # of all members, then the shared ones
    ) -> tuple[Tensor, ...]:
        ctx.make, ctx.end, ctx.inputs = make, end, tensors
        ctx.tensors = [t.detach().requires_grad_() if t.requires_grad else t for t in tensors]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            ctx.parts = make(ctx.tensors)
        ctx.num_own = num_own
        flat = [part for parts in ctx.parts for part in parts]
        outputs = tuple(part.detach() for part in flat)
        ctx.mark_non_differentiable(*(output for output, part in zip(outputs, flat) if not part.requires_grad))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.end()
        if torch.is_grad_enabled():  # create_graph=True
            wanted = [tensor.requires_grad for tensor in ctx.inputs]

            def plain(tensors: Sequence[Any]) -> list[Tensor]:
                return [part for parts in ctx.make(tensors) for part in parts]

            return None, None, None, *gradients(plain, ctx.inputs, wanted, grads)
        rest, outputs, given = iter(grads), list[Tensor](), list[Tensor]()
        results: list[Tensor | None] = list(ctx.tensors)
        for k, parts in enumerate(ctx.parts):
            mine = [(part, grad) for part, grad in zip(parts, rest) if grad is not None]
            outputs += [part for part, _ in mine]
            given += [grad for _, grad in mine]
            if not mine:
                results[k * ctx.num_own : (k + 1) * ctx.num_own] = [None] * ctx.num_own
        wanted = [k for k, tensor in enumerate(results) if tensor is not None and tensor.requires_grad]
        found = torch.autograd.grad(
            outputs, [ctx.tensors[k] for k in wanted], given, retain_graph=True, allow_unused=True
        )
        by_place = dict(zip(wanted, found))
        return None, None, None, *(by_place.get(k) for k in range(len(results)))
