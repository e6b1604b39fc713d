"""QuanTA's two routes through one layer, and whether the rule that chooses between them chose the faster.

    python benchmarks/circuit_routes.py [--rounds 7] [--device cuda] [--bf16]

Forward and backward of one frozen linear layer with a circuit, as in training: "apart" sends the activations through
the circuit beside the layer, "in weight" adds the circuit's matrix to the weight and multiplies once. Medians of rounds
in turn. The rule is `CircuitUpdate.is_cheaper_apart`, from the numbers of multiply-adds and of elements, and three
constants. The axes are `QuantaConfig`'s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import geometric_mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorpeft import QuantaConfig
from tensorpeft.networks.effective import effective_linear
from tensorpeft.sites import Site
from tensorpeft.studies.measure import median_step_times

SIZES = [(384, 384), (1536, 384), (1024, 1024), (2816, 1024), (1024, 2816), (4096, 4096)]  # (out, in)
ROWS = [128, 512, 2048]
_READS_NONE: Any = None  # QuanTA's start needs no weight


def routes(out: int, in_: int, num_axes: int, rows: int, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """A forward and backward by either route."""
    (update,) = QuantaConfig(num_axes=num_axes).build([Site("weight", out, in_)], _READS_NONE).values()
    update = update.to(device)
    for parameter in update.parameters():
        torch.nn.init.normal_(parameter, std=1e-2)
    weight = torch.randn(out, in_, device=device, dtype=dtype) * in_**-0.5
    x = torch.randn(rows, in_, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, out, device=device, dtype=dtype)
    leaves = [x, *update.parameters()]

    def apart() -> Tensor:
        return F.linear(x, weight) + update(x)

    def in_weight() -> Tensor:
        return effective_linear(x, weight, None, [update.cut()])

    def base() -> Tensor:
        return F.linear(x, weight)

    return {
        "apart": lambda: torch.autograd.grad(apart(), leaves, gradient),
        "in weight": lambda: torch.autograd.grad(in_weight(), leaves, gradient),
        "base": lambda: torch.autograd.grad(base(), [x], gradient),
        "rule": lambda: update.is_cheaper_apart(rows),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    print(f"{'weight':>12s} {'axes':>4s} {'rows':>5s}   {'base':>9s} {'apart':>9s} {'in weight':>9s}   rule")
    losses = []
    for out, in_ in SIZES:
        for num_axes in (3, 4):
            for rows in ROWS:
                steps = routes(out, in_, num_axes, rows, dtype, arguments.device)
                rule = "apart" if steps.pop("rule")() else "in weight"
                times = {name: median(taken) for name, taken in median_step_times(steps, arguments.rounds).items()}
                loss = times[rule] / min(times["apart"], times["in weight"])
                losses.append(loss)
                text = " ".join(f"{1e3 * times[name]:6.1f} ms" for name in ("base", "apart", "in weight"))
                print(f"{f'{out}x{in_}':>12s} {num_axes:4d} {rows:5d}   {text}   {rule:9s} {loss:5.2f} x the faster")
    print(f"The rule's choice takes {geometric_mean(losses):.2f} x the faster route, at worst {max(losses):.2f} x.")


if __name__ == "__main__":
    main()
