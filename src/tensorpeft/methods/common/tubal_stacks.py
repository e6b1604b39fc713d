"""Weights of one shape as one tensor, decomposed together: what LoRA-PT and tCURLoRA have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tensorpeft.networks.tubal import StackFactors, StackUpdate, Triplets, empty_triplets
from tensorpeft.plugin.config import Bases
from tensorpeft.sites import Site, group_by_tensor, shape_name


def build_stacks(
    sites: Sequence[Site],
    bases: Bases,
    rank: int,  # cut to the smaller side of the weights
    decompose: Callable[[Tensor, int], Triplets],  # weights (n, out, in), rank -> their factors
    trains_all: bool,  # as `StackFactors` has it
) -> Mapping[str, StackUpdate]:
    """A slice of its shape's stack per site, in the model's order. Holds the weights of one stack at a time.

    Raises:
        ValueError: a weight that cannot be decomposed.
    """
    groups, stacks = group_by_tensor(sites, shape_name), dict[str, Triplets]()
    for name, group in groups.items():
        out, in_ = group[0].out, group[0].in_
        if bases.read_weight(group[0]).is_meta:
            stacks[name] = empty_triplets(len(group), out, in_, min(rank, out, in_), has_diagonal=trains_all)
            continue
        try:
            stacks[name] = decompose(_read(group, bases), min(rank, out, in_))
        except ValueError as error:
            raise ValueError(f"{group[0].name} and the others of its shape: {error}") from error
    shared = StackFactors(stacks, trains_all)
    return {
        site.name: StackUpdate(shared, name, index)
        for name, group in groups.items()
        for index, site in enumerate(group)
    }


def _read(group: Sequence[Site], bases: Bases) -> Tensor:  # (n, out, in)
    first = bases.read_weight(group[0])
    dtype = torch.promote_types(first.dtype, torch.float32)
    weights = torch.empty(len(group), *first.shape, dtype=dtype, device=first.device)
    for place, site in zip(weights, group):
        place.copy_(bases.read_weight(site))
    return weights
