"""What DoTA's `r="auto"` asks for: a bond for every cut of every weight, given or chosen under a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensorpeft.modes import count_parameters
from tensorpeft.networks.bonds import Spectra, choose_bonds, unfolding_energies
from tensorpeft.networks.mpo import FrozenCores
from tensorpeft.plugin.config import Bases, check_rank
from tensorpeft.sites import Site

SiteBonds = dict[str, list[int]]  # {full name of a layer: its N − 1 inner bonds}
Modes = Callable[[int], tuple[int, ...]]  # of a size


def check_request(
    r: object, budget: object, bonds: Mapping[str, Any] | None, rank_pattern: Mapping[str, int], num_cores: int
) -> None:
    """Check the fields that belong together, before there is a model.

    Raises:
        ValueError: `r="auto"` with neither a budget nor bonds, or with a `rank_pattern`; a budget or bonds with a
            number for r; a budget below 1; bonds that are not num_cores − 1 whole numbers from 1 for every name.
    """
    if isinstance(r, str) and r != "auto":
        raise ValueError(f'r={r!r}: expected a whole number of at least 1, such as 16, or "auto" with a budget.')
    if r != "auto":
        for name, value in (("budget", budget), ("bonds", bonds)):
            if value is not None:
                raise ValueError(
                    f'{name}={value!r} goes with r="auto", but r={r!r} gives every bond its largest value: pass '
                    f'r="auto", or leave {name} out.'
                )
        return
    if rank_pattern:
        raise ValueError(
            f'rank_pattern={rank_pattern!r} gives layers an r of their own, but r="auto" chooses all bonds: leave '
            "one of the two out."
        )
    if budget is None and bonds is None:
        raise ValueError(
            'r="auto" chooses the bonds under a budget, but budget=None: pass budget=N, the number of trained '
            "parameters, or the bonds themselves, such as those that `tensorpeft inspect MODEL` writes."
        )
    if budget is not None:
        check_rank("budget", budget, largest=2**63)
    if bonds is not None:
        _check_bonds(bonds, num_cores)


def _check_bonds(bonds: Mapping[str, Any], num_cores: int) -> None:
    for name, found in bonds.items():
        is_whole = isinstance(found, (list, tuple)) and all(type(bond) is int and bond > 0 for bond in found)
        if not is_whole or len(found) != num_cores - 1:
            raise ValueError(
                f"bonds[{name!r}]={found!r}: expected {num_cores - 1} whole numbers of at least 1, one for each bond "
                f"between the num_cores={num_cores} cores."
            )


def choose_site_bonds(
    sites: Sequence[Site], bases: Bases, modes: Modes, budget: int, keeps_starts: bool
) -> SiteBonds:  # of every site
    """The bonds of all sites for at most `budget` parameters. Reads one weight at a time.

    Args:
        sites: what the adapter adapts.
        bases: where the weights are read.
        modes: the modes of a size.
        budget: trained parameters of all sites.
        keeps_starts: where a base layer has a start of its own (QDoTA's), its bonds are the site's, and count.

    Raises:
        ValueError: a weight that is on the meta device or not finite, or a budget that bonds of 1 exceed.
    """
    chosen: SiteBonds = {}
    spectra: dict[str, Spectra] = {}
    left = budget
    for site in sites:
        if keeps_starts and isinstance(start := bases.start(site), FrozenCores):
            chosen[site.name] = [core.shape[3] for core in start.cores()[:-1]]
            left -= sum(core.numel() for core in start.cores())
            continue
        weight = bases.read_weight(site)
        if weight.is_meta:
            raise ValueError(
                f'{site.name}: r="auto" chooses the bonds from the weights, but this one is on the meta device. Load '
                "the model with its weights, or pass bonds={...}, such as `tensorpeft inspect MODEL` writes."
            )
        out_modes, in_modes = modes(site.out), modes(site.in_)
        try:
            energies = unfolding_energies(weight, out_modes, in_modes)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from error
        spectra[site.name] = Spectra(tuple(i * j for i, j in zip(out_modes, in_modes)), energies)
    if left < 0:
        raise ValueError(
            f"budget={budget:,}: the residual base was quantised with cores of {budget - left:,} parameters, which the "
            "adapter trains. Raise the budget to that, or quantise the model again with this configuration."
        )
    if spectra:
        try:
            found = choose_bonds(list(spectra.values()), left)
        except ValueError as error:
            kept = "" if left == budget else f"of budget={budget:,}, the start of the residual base leaves {left:,}: "
            raise ValueError(f"{kept}{error}") from error
        chosen.update({name: list(bonds) for name, bonds in zip(spectra, found)})
    return {site.name: chosen[site.name] for site in sites}


def check_site_bonds(bonds: SiteBonds, sites: Sequence[Site], modes: Modes, budget: int | None) -> None:
    """Check bonds against the layers that are adapted.

    Raises:
        ValueError: a site without bonds, or more parameters than a budget that is given too.
    """
    if missing := next((site.name for site in sites if site.name not in bonds), None):
        raise ValueError(
            f"{missing}: bonds has no entry for it, expected one for each of the {len(sites)} adapted layers; it names "
            f"{len(bonds)}, such as {next(iter(bonds), None)!r}. Were they chosen for another model or other layers? "
            "Pass bonds=None and a budget to choose them anew."
        )
    size = sum(count_parameters(modes(site.out), modes(site.in_), bonds[site.name]) for site in sites)
    if budget is not None and size > budget:
        raise ValueError(
            f"budget={budget:,}: the given bonds make {size:,} parameters. Raise the budget, leave it out, or pass "
            "bonds=None to choose the bonds anew."
        )
