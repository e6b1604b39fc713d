"""What of DoTA's start matters? Validation losses of variants of it, each at its own best learning rate.

    python benchmarks/dota_start.py [--steps 60] [--seeds 3] [--variants a,b]

MiniLM-L6 on the docstrings of Python's library, the same targets, batches and schedule for all. The learning rate is
chosen on the validation loss with the first seed; the test split is not touched. Each variant changes one thing:

    mpo              DoTA: the MPO of the pretrained weight, singular values in the last core
    random           DoTA-random: Gaussian cores, the last one zero
    gaussian         the MPO of a Gaussian matrix of the weight's norm, subtracted again like DoTA's
    balanced         mpo, the cores rescaled to one root mean square (the same MPO)
    first            mpo, the singular values moved to the first core (the same MPO)
    no-residual      mpo, without the residual W0 - MPO: the weight is its MPO alone
    r8, r32          mpo with another bond
    random-r8, random-r32
    auto             mpo with adaptive bonds, as many parameters as bond 16 has
    random-auto      random cores with the same bonds

Adam's step does not depend on the scale of a gradient, so `balanced` is also the answer to a learning rate per core:
training the rescaled cores at one rate is training the original ones at rates proportional to their size.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers.utils import logging

from minilm_runs import TARGETS, Schedule, build_model, load_rows, train
from tensorpeft import DotaConfig
from tensorpeft.modes import factor_modes
from tensorpeft.networks.mpo import MpoUpdate, contract, decompose

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
R = 16


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The adapted layers."""
    return [module for module in model.modules() if hasattr(module, "updates")]


def set_cores(update: MpoUpdate, cores: Sequence[Tensor]) -> None:
    """Start an update at other cores, and subtract those."""
    with torch.no_grad():
        for k, core in enumerate(cores, 1):
            getattr(update, f"core_{k}").copy_(core)
            getattr(update, f"start_{k}").copy_(core)


def rms(tensor: Tensor) -> float:
    """Root mean square."""
    return tensor.detach().square().mean().sqrt().item()


def start_gaussian(model: nn.Module) -> None:
    """The MPO of a Gaussian matrix of each weight's norm."""
    for layer in layers_of(model):
        weight = layer.base_layer.weight
        noise = torch.randn(weight.shape) * rms(weight)
        modes = [factor_modes(size, 5) for size in weight.shape]
        set_cores(layer.updates["default"], decompose(noise, *modes, R))


def start_without_residual(model: nn.Module) -> None:
    """The residual off: what the MPO does not hold of the weight is gone, so that W = MPO(T) alone."""
    for layer in layers_of(model):
        start = contract(layer.updates["default"].cores())
        with torch.no_grad():
            layer.base_layer.weight.copy_(start)


def start_first(model: nn.Module) -> None:
    """The same MPO, right-orthonormal: the singular values sit in the first core."""
    for layer in layers_of(model):
        update = layer.updates["default"]
        flipped = [core.detach().permute(3, 1, 2, 0) for core in update.cores()][::-1]
        rest = torch.ones(1, 1)
        orthonormal = []
        # A QR sweep over the reversed chain makes it left-orthonormal, which is right-orthonormal read backwards.
        for k, core in enumerate(flipped):
            core = torch.einsum("ab,bijc->aijc", rest, core)
            if k == len(flipped) - 1:
                orthonormal.append(core)
                break
            q, rest = torch.linalg.qr(core.flatten(0, 2))
            orthonormal.append(q.view(*core.shape[:3], -1))
        set_cores(update, [core.permute(3, 1, 2, 0) for core in orthonormal][::-1])


VARIANTS: dict[str, tuple[dict, Callable[[nn.Module], None] | None]] = {
    "mpo": ({}, None),
    "random": ({"init_weights": "random"}, None),
    "gaussian": ({}, start_gaussian),
    "balanced": ({"init_weights": "balanced"}, None),
    "first": ({}, start_first),
    "no-residual": ({}, start_without_residual),
    "r8": ({"r": 8}, None),
    "r32": ({"r": 32}, None),
    "random-r8": ({"r": 8, "init_weights": "random"}, None),
    "random-r32": ({"r": 32, "init_weights": "random"}, None),
    "auto": ({"r": "auto", "budget": 273_042}, None),
    "random-auto": ({"r": "auto", "budget": 273_042, "init_weights": "random"}, None),
}


def run(
    variant: str,
    rate: float,
    seed: int,
    rows: dict,
    schedule: Schedule,
    on_step: Callable[[], object],
) -> list[list[float]]:
    """The validation losses of one run, [[step, loss], …]."""
    arguments, change = VARIANTS[variant]
    model = build_model(DotaConfig(**{"r": R, **arguments}, target_modules=TARGETS, task_type="SEQ_CLS"), seed)
    if change is not None:
        torch.manual_seed(seed)
        change(model)
    return [list(point) for point in train(model, rows, schedule, rate, seed, on_step)]


def main() -> None:
    """Print a table, and write every run to a JSON file that a later call continues."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="of the cores")
    parser.add_argument("--head-rate", type=float, help="of the new classification head; without it: that of the cores")
    parser.add_argument("--output", type=Path, default=Path("runs/dota_start"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    schedule = Schedule(steps=arguments.steps, num_evaluations=4, head_rate=arguments.head_rate)
    rows = load_rows(schedule)
    arguments.output.mkdir(parents=True, exist_ok=True)
    head = "" if arguments.head_rate is None else f"-head{arguments.head_rate:g}"
    file = arguments.output / f"docstrings-{arguments.steps}{head}.json"
    done: dict[str, list] = json.loads(file.read_text()) if file.exists() else {}
    variants = arguments.variants.split(",")
    rates = [float(rate) for rate in arguments.rates.split(",")]
    console = Console()

    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(variants) * (len(rates) + arguments.seeds - 1) * arguments.steps)

        def loss(variant: str, rate: float, seed: int) -> float:
            key = f"{variant} {rate:g} {seed}"
            progress.update(bar, description=key)
            if key in done:
                progress.advance(bar, arguments.steps)
            else:
                on_step = lambda: progress.advance(bar)  # noqa: E731
                done[key] = run(variant, rate, seed, rows, schedule, on_step)
                file.write_text(json.dumps(done, indent=1))
            return done[key][-1][1]

        table = []
        for variant in variants:
            search = {rate: loss(variant, rate, 0) for rate in rates}
            best = min(search, key=search.__getitem__)
            losses = [loss(variant, best, seed) for seed in range(arguments.seeds)]
            table.append((variant, search, best, losses))

    console.print(f"docstrings, {arguments.steps} steps: final validation loss")
    print(f"{'variant':12s} {'  '.join(f'{rate:>7g}' for rate in rates)}   best rate: mean ± sd over seeds")
    for variant, search, best, losses in table:
        cells = "  ".join(f"{value:7.3f}" for value in search.values())
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"{variant:12s} {cells}   {best:g}: {statistics.mean(losses):.3f} ± {spread:.3f}")


if __name__ == "__main__":
    main()
