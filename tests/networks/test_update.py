"""What updates of several adapters must have in common to be stacked, and which tensors their factors are made of."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorpeft.networks.low_rank import Factors
from tensorpeft.networks.mpo import MpoUpdate, random_cores
from tensorpeft.networks.update import AbstractLowRankUpdate, SharedFactors, stacked_factors

OUT, IN, RANK = 5, 4, 2


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Frames(SharedFactors):
    """A trained factor and a frozen one, in no checkpoint, as a method may draw or read from the weights."""

    def __init__(self, seed: int = 0, offset: float = 0.0):
        super().__init__()
        self.offset = offset
        self.up = nn.Parameter(numbers(OUT, RANK, seed=seed))
        self.register_buffer("frame", numbers(RANK, IN, seed=seed + 100), persistent=False)


class FramedUpdate(AbstractLowRankUpdate):
    """`ΔW = scale · up diag(core) (frame + offset)`, and whatever else it is given as attributes."""

    def __init__(self, shared: Frames, seed: int = 0, **fields: Any):
        super().__init__(shared)
        self.core = nn.Parameter(numbers(RANK, seed=seed + 200))
        self.register_buffer("sign", torch.ones(RANK) if seed % 2 else -torch.ones(RANK))
        for name, value in {"scale": 1.0, **fields}.items():
            setattr(self, name, value)

    def factors_from(self, tensors: Mapping[str, Tensor]) -> Factors:
        core = tensors["core"] * tensors["sign"] * self.scale
        return Factors(tensors["frame"] + self.shared.offset, core, tensors["up"])

    def tensor_name(self) -> str:
        return "frames"


def seeded(count: int, **fields: Any) -> list[FramedUpdate]:
    return [FramedUpdate(Frames(seed), seed, **fields) for seed in range(count)]


def test_frozen_tensors_reach_the_factors():
    update = FramedUpdate(Frames(3), 3, scale=2.0)
    down, core, up = update.factors()
    assert torch.equal(down, numbers(RANK, IN, seed=103))
    assert torch.equal(core, 2 * numbers(RANK, seed=203))
    assert torch.equal(up, update.shared.up)
    assert torch.equal(FramedUpdate(Frames(3), 2).factors().core, -numbers(RANK, seed=202))


def test_stacked_factors_are_those_of_each():
    updates = seeded(5)
    stacked = stacked_factors(updates)
    for k, update in enumerate(updates):
        assert all(torch.equal(found[k], expected) for found, expected in zip(stacked, update.factors(), strict=True))


@pytest.mark.parametrize(("name", "first", "other"), [("scale", 1.0, 2.0), ("label", "a", "b")])
def test_updates_that_differ_in_an_attribute_are_stacked_with_it(name: str, first: Any, other: Any):
    updates = [FramedUpdate(Frames(offset=k), k, **{name: value}) for k, value in enumerate([first] * 3 + [other])]
    stacked = stacked_factors(updates)
    for k, update in enumerate(updates):
        assert all(torch.equal(found[k], expected) for found, expected in zip(stacked, update.factors(), strict=True))


def test_updates_of_different_shapes_dtypes_or_kinds_are_not_stacked():
    update = FramedUpdate(Frames())
    assert stacked_factors([update, FramedUpdate(Frames()).double()]) is None
    assert stacked_factors([update, MpoUpdate(random_cores((2, 2), (2, 2), 2))]) is None
    smaller = FramedUpdate(Frames())
    smaller.shared.up = nn.Parameter(torch.ones(OUT - 1, RANK))
    assert stacked_factors([update, smaller]) is None
