"""Which rule makes the window of learning rates wide: rates per core, scaled gradients, or bounded steps?

    python benchmarks/rate_rules.py studies/rates_gsm8k trainer.max_steps=40

LoRA, DoTA and MetaTT are chains of cores between bonds, LoRA's two factors the shortest. Every entry of a comparison
that is one of them is trained under every rule, AdamW with

- one rate: the same for all cores;
- fan-in: the rate over what a core's outputs are sums of, relative to the smallest such number of the chain;
- LoRA+: 16 times the rate for the core that starts at zero, or for the last (arXiv 2402.12354);
- scaled: each gradient multiplied, at either bond, by the inverse of the Gram matrix of all cores on that side, before
  the moments (arXiv 2402.02347, for a chain);
- bounded: one rate, and `tensorpeft.BoundedSteps` at 0.01,

from the middle of the entry's rates on, half powers of ten apart, until the loss is more than 0.02 nats above the best
one on either side. `--output` keeps what is done: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log10
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from step_divergence import make_run
from tensorpeft import BoundedSteps
from tensorpeft.loading.quiet import quiet
from tensorpeft.networks.mpo import MpoUpdate
from tensorpeft.networks.train_slices import TrainFactors
from tensorpeft.reports.tables import Table
from tensorpeft.reports.terminal import print_table
from tensorpeft.studies.compare.entries import Entry, load_entries
from tensorpeft.studies.rates import rate_grid, rate_window

_RATIO = 16.0  # LoRA+, as in its examples
_DAMPING = 1e-6  # of a Gram matrix's mean eigenvalue
_STEPS_OUT = 3  # half powers of ten, at most, beyond the first three rates on either side


@dataclass(frozen=True)
class Core:
    """A parameter of a chain.

    Args:
        parameter: the core; its input modes are summed over, its output modes are not.
        left: the axis of the bond to the core before, None at the chain's start.
        right: of the bond to the core behind, None at its end.
        fan_in: how many numbers each of its outputs is the sum of.
    """

    parameter: nn.Parameter
    left: int | None
    right: int | None
    fan_in: int


Chain = Sequence[Core]


def find_chains(model: nn.Module) -> list[Chain]:
    """The chains of all adapted weights."""
    found: list[Chain] = []
    for module in model.modules():
        if isinstance(module, MpoUpdate):
            found.append(_bonded(module.cores(), lambda core: core.shape[2] * core.shape[3]))
        elif isinstance(module, TrainFactors):
            for name in module.sizes:
                found.append(_bonded_train(module.cores(name)))
        elif len(getattr(module, "lora_A", {})):
            module_: Any = module
            down, up = module_.lora_A["default"].weight, module_.lora_B["default"].weight
            found.append([Core(down, None, 0, down.shape[1]), Core(up, 1, None, up.shape[1])])
    return found


def _bonded(cores: Sequence[Any], fan_in: Callable[[Tensor], int]) -> Chain:
    """Of cores (bond_left, modes …, bond_right), the outer bonds of size 1."""
    return [Core(core, 0, core.ndim - 1, fan_in(core)) for core in cores]


def _bonded_train(cores: Sequence[Any]) -> Chain:
    """Of MetaTT's (in, r), (slices, r, r) …, (r, out), which a row vector is multiplied by from the left."""
    first, *inner, last = cores
    return [
        Core(first, None, 1, first.shape[0]),
        *(Core(core, 1, 2, core.shape[1]) for core in inner),
        Core(last, 0, None, last.shape[0]),
    ]


def grams(chain: Chain) -> list[tuple[Tensor, Tensor]]:  # of each core: left of it (b, b), right of it (b', b')
    """The Gram matrices of the chain's two parts around each core, over all their modes."""
    rows = [_rows(core) for core in chain]
    lefts, rights = [torch.ones(1, 1)], [torch.ones(1, 1)]
    for core in rows[:-1]:
        lefts.append(torch.einsum("amb,ac,cmd->bd", core, lefts[-1], core))
    for core in rows[:0:-1]:
        rights.append(torch.einsum("amb,bd,cmd->ac", core, rights[-1], core))
    return list(zip(lefts, reversed(rights), strict=True))


def _rows(core: Core) -> Tensor:  # (bond_left, all modes, bond_right), 1 at an end of the chain
    tensor = core.parameter.detach()
    axes = [axis for axis in (core.left, core.right) if axis is not None]
    modes = [axis for axis in range(tensor.ndim) if axis not in axes]
    sizes = [1 if axis is None else tensor.shape[axis] for axis in (core.left, core.right)]
    order = [*axes[: core.left is not None], *modes, *axes[core.left is not None :]]
    return tensor.permute(order).reshape(sizes[0], -1, sizes[1])


def precondition(chains: Sequence[Chain]) -> None:
    """Multiply each gradient by the inverse Gram matrices at its bonds."""
    for chain in chains:
        for core, (left, right) in zip(chain, grams(chain), strict=True):
            grad = core.parameter.grad
            if grad is not None:
                for axis, gram in ((core.left, left), (core.right, right)):
                    if axis is not None:
                        grad = (grad.movedim(axis, -1) @ _inverse(gram)).movedim(-1, axis)
                core.parameter.grad = grad.contiguous()


def _inverse(gram: Tensor) -> Tensor:
    size = gram.trace() / len(gram)
    if size == 0:
        return torch.eye(len(gram))  # what is beside is zero, and so is the gradient
    relative = (gram / size).double() + _DAMPING * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.inv(relative).to(gram.dtype) / size


def factors(rule: str, chain: Chain) -> list[float]:
    """What each core's rate is multiplied by."""
    if rule == "fan-in":
        least = min(core.fan_in for core in chain)
        return [least / core.fan_in for core in chain]
    if rule == "LoRA+":
        zeros = [not core.parameter.any() for core in chain]
        chosen = zeros.index(True) if any(zeros) else len(chain) - 1
        return [_RATIO if k == chosen else 1.0 for k in range(len(chain))]
    return [1.0] * len(chain)


RULES = ("one rate", "fan-in", "LoRA+", "scaled", "bounded")


@quiet()
def train(entry: Entry, rule: str, rate: float, seed: int) -> float:
    """The validation loss after a run; infinite where it is lost."""
    with TemporaryDirectory() as folder:
        trainer = make_run(entry, rate, seed, folder)
        model: Any = trainer.model
        chains = find_chains(model)
        if not chains:
            raise SystemExit(f"{entry.label} is no chain of cores: expected LoRA, DoTA or MetaTT.")
        if rule == "bounded":
            trainer.add_callback(BoundedSteps(0.01))
        groups = [
            {"params": [core.parameter], "lr": rate * factor}
            for chain in chains
            for core, factor in zip(chain, factors(rule, chain), strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        if rule == "scaled":
            optimizer.register_step_pre_hook(lambda *_: precondition(chains))
        trainer.optimizer = optimizer
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    return loss if isfinite(loss) else inf


def search(find: Callable[[float], float], center: float) -> list[tuple[float, float]]:
    """Losses by rate, ascending: three rates, then outwards until both ends of the window are known, or too far."""
    center_power = round(2 * log10(center))
    powers = range(center_power - 1 - _STEPS_OUT, center_power + 2 + _STEPS_OUT)
    rates = {power: rate_grid(10 ** (power / 2), 1)[0] for power in powers}
    losses = {power: find(rates[power]) for power in range(center_power - 1, center_power + 2)}
    while True:
        window = rate_window([(rates[power], losses[power]) for power in sorted(losses)])
        beyond = []
        if window is None or window.high_is_open:
            beyond.append(max(losses) + 1)
        if window is None or window.low_is_open:
            beyond.append(min(losses) - 1)
        beyond = [power for power in beyond if power in rates]
        if not beyond:
            return [(rates[power], losses[power]) for power in sorted(losses)]
        losses |= {power: find(rates[power]) for power in beyond}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", metavar="RECIPE", help="of a comparison")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", default="lora,dota,metatt", metavar="A,B")
    parser.add_argument("--rules", default=",".join(RULES), metavar="A,B", help=f"of {', '.join(RULES)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/rate_rules.jsonl"), metavar="FILE")
    arguments = parser.parse_args()
    comparison = load_entries(arguments.recipe, methods=arguments.methods, overrides=arguments.overrides)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
    done = {tuple(key): loss for *key, loss in map(json.loads, output.read_text().splitlines())}
    progress = tqdm(unit="run")

    def loss_of(entry: Entry, rule: str, rate: float) -> float:
        key = (entry.key, " ".join(arguments.overrides), rule, rate, arguments.seed)
        if key not in done:
            progress.set_postfix_str(f"{entry.label}, {rule}, {rate:g}")
            done[key] = train(entry, rule, rate, arguments.seed)
            with output.open("a") as file:
                file.write(json.dumps([*key, done[key]]) + "\n")
            progress.update()
        return done[key]

    rows = []
    for entry in comparison.entries:
        for rule in arguments.rules.split(","):
            center = entry.rates[len(entry.rates) // 2]
            losses = search(lambda rate: loss_of(entry, rule, rate), center)  # noqa: B023 - used at once
            window = rate_window(losses)
            best = min(loss for _, loss in losses)
            told = ", ".join(f"{rate:g} {loss:.3f}" for rate, loss in losses)
            is_open = window is not None and (window.low_is_open or window.high_is_open)
            factor = "" if window is None else f"{'≥ ' * is_open}{float(f'{window.factor:.2g}'):g}"
            rows.append((entry.label, rule, f"{best:.3f}", told, factor))
    progress.close()
    headers = ("method", "rule", "best loss", "loss by rate", "window")
    print_table(Console(), Table(f"Rules for a rate, {arguments.recipe}", headers, rows))


if __name__ == "__main__":
    main()
