"""What updates of several adapters must have in common to be stacked, and which tensors their factors are made of."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tensorpeft.networks.low_rank import Factors
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


class Rescaled(FramedUpdate):
    pass


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


def test_a_frozen_tensor_that_all_share_is_stacked_without_copies_and_a_change_is_seen():
    updates = [FramedUpdate(Frames(7), seed) for seed in range(4)]
    frame = updates[0].shared.frame
    found = updates[0].shared.stacked_with([update.shared for update in updates[1:]])["frame"]
    assert found.shape == (4, RANK, IN)
    assert found.untyped_storage().data_ptr() == frame.untyped_storage().data_ptr()
    updates[2].shared.frame.add_(1)
    found = updates[0].shared.stacked_with([update.shared for update in updates[1:]])["frame"]
    assert torch.equal(found, torch.stack([update.shared.frame for update in updates]))
    assert not torch.equal(found[2], frame)


class Helper(nn.Linear):
    def __init__(self, power: int):
        super().__init__(1, 1)
        self.power = power


@pytest.mark.parametrize(
    ("name", "first", "other"),
    [
        ("scale", 1.0, 2.0),
        ("_scale", 1.0, 2.0),
        ("name", "a", "b"),
        ("modes", (2, 3), (3, 2)),
        ("sizes", {"a": [1, 2]}, {"a": [2, 1]}),
        ("sizes", {"a": 1}, {"b": 1}),
        ("limit", None, 3),
        ("dtype", torch.float32, torch.float64),
        ("helper", Helper(1), Helper(2)),
        # Of these it cannot be said whether they are equal: each on its own is the safe side.
        ("table", np.arange(3), np.arange(3)),
        ("hidden", torch.ones(2), torch.ones(2)),
        ("hidden", [torch.ones(2)], [torch.ones(2)]),
    ],
)
def test_updates_that_differ_in_an_attribute_are_not_stacked(name: str, first: Any, other: Any):
    updates = [FramedUpdate(Frames(seed), seed, **{name: value}) for seed, value in enumerate([first] * 3 + [other])]
    assert stacked_factors(updates[:3]) is not None
    assert stacked_factors(updates) is None
    assert stacked_factors(updates[::-1]) is None


def test_updates_that_differ_in_more_than_their_numbers_are_not_stacked():
    update = FramedUpdate(Frames())
    assert stacked_factors([update, FramedUpdate(Frames(offset=1.0))]) is None
    assert stacked_factors([update, Rescaled(Frames())]) is None
    wider = FramedUpdate(Frames())
    wider.core = nn.Parameter(torch.ones(RANK + 1))
    assert stacked_factors([update, wider]) is None
    more = FramedUpdate(Frames())
    more.register_buffer("more", torch.ones(1))
    assert stacked_factors([update, more]) is None


def test_what_torch_and_the_caches_keep_does_not_count():
    updates = seeded(3)
    updates[0].train()
    updates[1].eval()
    updates[1].shared.eval()
    updates[2].requires_grad_(False)
    assert stacked_factors(updates) is not None
    assert stacked_factors(updates) is not None  # with what the first call kept
