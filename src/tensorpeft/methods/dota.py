"""DoTA (arXiv 2412.20891): the matrix product operator of the pretrained weight, fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tensorpeft.methods.common.adaptive_bonds import check_request, check_site_bonds, choose_site_bonds
from tensorpeft.modes import bond_dimensions, factor_modes
from tensorpeft.networks.group import join
from tensorpeft.networks.mpo import FrozenCores, MpoUpdate, balance, decomposition_steps, random_cores
from tensorpeft.networks.subspace import Steps, run_together
from tensorpeft.plugin.config import Bases, TensorConfig, check_modes, check_num_modes, check_rank
from tensorpeft.plugin.patterns import value_for
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site

# Weights on a GPU that are decomposed in step with each other: 16 of 4096 x 4096 in float32 are a gigabyte.
_AT_ONCE = 16


@register("dota")
@dataclass
class DotaConfig(TensorConfig):
    """`W = W0 + MPO(T) − MPO(T_start)`: the cores T are trained, T_start is the MPO of W0 cut to the bond r.

    The paper trains `W_res + MPO(T)` with `W_res = W0 − MPO(T_start)`, which is the same; we leave W0 as it is.
    It has no alpha and no dropout. With the paper's five cores and r = 16 the adapter of a 4096 x 4096 weight has
    37,376 parameters; LoRA of rank 16 has 131,072.

    Args:
        r: largest bond dimension, the rank of the network; or "auto": every bond of every layer is chosen from the
            weights, so that all of them together lose least (`networks.bonds`).
        num_cores: number of cores, at least 2.
        modes: {size: [mode, …]} for sizes to be factored otherwise than `modes.factor_modes` does; one mode per core.
        init_weights: True: T starts at the MPO of the pretrained weight. "balanced": at the same MPO, its cores scaled
            to one root mean square, so that a step of Adam changes each by as much of itself: a larger rate is
            forgiven. "random": at Gaussian cores, the last one zero, the paper's ablation. False: at Gaussian cores and
            nothing subtracted, which is *not* the identity.
        rank_pattern: {name or regular expression: r} for layers with a bond of their own.
        budget: with "auto": trained parameters of all layers, at most; the bonds come close to it.
        bonds: with "auto": {full name of a layer: [b_1, …, b_{N-1}]}. None: chosen when the first adapter or residual
            base is made with this configuration, and **written here**, so that they are saved and used again.

    Raises:
        ValueError: a bond below 1, fewer than 2 cores, an unknown start, modes that do not multiply to their size or
            are not one per core, "auto" without a budget or bonds, or a budget or bonds without "auto".

    Source: DoTA, section 3.2; defaults of its section 4; the scale of the random cores is ours (`networks.mpo`), and so
    are adaptive bonds.

    >>> DotaConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]).num_cores
    5
    """

    r: int | Literal["auto"] = field(default=16, metadata={"help": 'Largest bond dimension, or "auto".'})
    num_cores: int = field(default=5, metadata={"help": "Number of cores of the matrix product operator."})
    modes: dict[int, list[int]] | None = field(default=None, metadata={"help": "{size: modes} that override ours."})
    init_weights: bool | Literal["balanced", "random"] = field(
        default=True, metadata={"help": "Where the cores start."}
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "{name or pattern: r}."})
    budget: int | None = field(default=None, metadata={"help": 'Trained parameters, with r="auto".'})
    bonds: dict[str, list[int]] | None = field(default=None, metadata={"help": '{layer: bonds}, with r="auto".'})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        given_r = {} if isinstance(self.r, str) else {"r": self.r}
        for name, r in {**given_r, **{f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}}.items():
            check_rank(name, r)
        check_num_modes("num_cores", self.num_cores, example=5)
        if self.init_weights not in (True, False, "balanced", "random"):
            raise ValueError(f'init_weights={self.init_weights!r}: expected True, "balanced", "random" or False.')
        self.modes = check_modes(self.modes, self.num_cores, of="core")
        check_request(self.r, self.budget, self.bonds, self.rank_pattern, self.num_cores)

    def settle(self, sites: Sequence[Site], bases: Bases) -> None:
        """With r="auto" and no bonds yet: choose them, and keep them in `bonds`. Reads one weight at a time."""
        if self.r == "auto" and self.bonds is None and sites:
            assert self.budget is not None  # checked with the fields
            self.bonds = choose_site_bonds(sites, bases, self._modes, self.budget, self._starts_at_weight)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, MpoUpdate]:
        """An MPO per site. Reads one weight at a time, on a GPU a few; where the base layer has its own start, none."""
        if self.bonds is not None:
            check_site_bonds(self.bonds, sites, self._modes, self.budget)
        # A CPU gains nothing by several at once, and would hold as many weights.
        on_gpu = self._starts_at_weight and len(sites) > 1 and bases.read_weight(sites[0]).is_cuda
        updates: dict[str, MpoUpdate] = {}
        for first in range(0, len(sites), step := _AT_ONCE if on_gpu else 1):
            together = sites[first : first + step]
            made = run_together([self._build_one(site, bases) for site in together])
            updates.update(zip((site.name for site in together), made))
        return join(updates)

    def _build_one(self, site: Site, bases: Bases) -> Steps[MpoUpdate]:
        out_modes, in_modes = self._modes(site.out), self._modes(site.in_)
        r = value_for(site.name, self.rank_pattern, self.r) if self.bonds is None else self.bonds[site.name]
        assert not isinstance(r, str)  # settled
        if self._starts_at_weight and isinstance(start := bases.start(site), FrozenCores):
            if self.init_weights == "balanced":
                raise ValueError(
                    f'{site.name}: init_weights="balanced", but its residual base has a start of its own, whose cores '
                    "are as they are. Use init_weights=True."
                )
            bonds = bond_dimensions(out_modes, in_modes, r)
            _check_start(site.name, start, list(zip(bonds[:-1], out_modes, in_modes, bonds[1:])))
            return MpoUpdate(start.cores(), start)
        weight = bases.read_weight(site)
        if weight.is_meta:
            bonds = bond_dimensions(out_modes, in_modes, r)
            shapes = zip(bonds[:-1], out_modes, in_modes, bonds[1:])
            cores = [torch.empty(shape, device="meta") for shape in shapes]
        elif self._starts_at_weight:
            try:
                cores = yield from decomposition_steps(weight, out_modes, in_modes, r)
            except ValueError as error:
                raise ValueError(f"{site.name}: {error}") from error
            if self.init_weights == "balanced":
                cores = balance(cores)
        else:
            cores = random_cores(out_modes, in_modes, r)
        if self.init_weights == "random":
            cores[-1].zero_()
        if not self._starts_at_weight:
            return MpoUpdate(cores)
        return MpoUpdate(cores, start=cores, starts_at_projection=True)

    @property
    def _starts_at_weight(self) -> bool:
        return self.init_weights in (True, "balanced")

    def _modes(self, size: int) -> tuple[int, ...]:
        return tuple((self.modes or {}).get(size) or factor_modes(size, self.num_cores))


def _check_start(name: str, start: FrozenCores, expected: list[tuple[int, int, int, int]]) -> None:
    found = [tuple(core.shape) for core in start.cores()]
    if found != expected:
        raise ValueError(
            f"{name}: its residual base was quantised with cores of the shapes {found}, but this configuration asks "
            f"for {expected}. Use the r, num_cores and modes (or bonds) that the base was quantised with, quantise "
            'it again with these, or start elsewhere: init_weights="random".'
        )
