"""Does a bfloat16 base lose small updates? Training losses of DoTA on a float32 and on a bfloat16 model.

    python benchmarks/bf16_loss.py [--steps 60] [--rates 3e-4,3e-3]

MiniLM-L6 on the docstrings task, one seed, the same batches for all. How W0 + ΔW becomes bfloat16:

    float32          it does not: the reference
    two products     W0 x and ΔW x apart, rounded at the output
    nearest          rounded to the nearest bfloat16
    dither           rounded with a fixed dither (what the library does)

The second table has one weight and a random update of a given size: the share of the update that survives the cast,
projected on the update.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from minilm_runs import TARGETS, Schedule, build_model, load_rows, train
from tensorpeft import DotaConfig
from tensorpeft.networks import kernels
from tensorpeft.networks.cut import Cut
from tensorpeft.networks.effective import effective_weight
from tensorpeft.networks.mpo import MPO, contract, random_cores
from tensorpeft.plugin import layer

dither = kernels.dither
addable_weight = layer.addable_weight


def round_to_nearest(part: Tensor, dropped_bits: int, first_row: int, first_column: int) -> Tensor:
    """What a plain cast does."""
    return part.bfloat16().float()


def never_addable(base: nn.Module) -> None:
    """Make every layer run its base and its update apart."""


CASTS: dict[str, tuple[torch.dtype, Callable, Callable]] = {
    "float32": (torch.float32, dither, addable_weight),
    "two products": (torch.bfloat16, dither, never_addable),
    "nearest": (torch.bfloat16, round_to_nearest, addable_weight),
    "dither": (torch.bfloat16, dither, addable_weight),
}


class Float32Loss(nn.Module):
    """The model, with its loss taken from its logits in float32: in bfloat16 a loss of 2 moves in steps of 0.016."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        """Logits and loss."""
        logits = self.model(**inputs).logits
        return SequenceClassifierOutput(loss=cross_entropy(logits.float(), labels), logits=logits)


def losses(name: str, schedule: Schedule, rate: float, rows: dict) -> list[tuple[int, float]]:
    """The validation losses along a run."""
    dtype, kernels.dither, layer.addable_weight = CASTS[name]
    config = DotaConfig(r=16, target_modules=TARGETS, task_type="SEQ_CLS")
    model = get_peft_model(build_model(None, seed=0).to(dtype), config)
    return train(Float32Loss(model), rows, schedule, rate, 0)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", default="3e-4,3e-3")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    schedule = Schedule(steps=arguments.steps, num_evaluations=6)
    rows = load_rows(schedule)
    for rate in map(float, arguments.rates.split(",")):
        print(f"\nvalidation loss, learning rate {rate:g}, after step")
        print(f"{'':14s} {'  '.join(f'{step:6d}' for step in schedule.evaluation_steps())}")
        for name in CASTS:
            curve = losses(name, schedule, rate, rows)
            print(f"{name:14s} {'  '.join(f'{loss:6.4f}' for _, loss in curve)}", flush=True)

    print("\nshare of the update that survives the cast of W0 + ΔW to bfloat16")
    print(f"{'|ΔW| / |W0|':14s} {'nearest':>9s} {'dither':>9s}")
    torch.manual_seed(0)
    weight = (torch.randn(1024, 1024) * 0.02).bfloat16()
    cores = random_cores((4,) * 5, (4,) * 5, 16)
    for share in (1e-5, 1e-4, 1e-3, 1e-2):
        scaled = [cores[0] * (share * weight.float().norm() / contract(cores).norm()), *cores[1:]]
        update, survivors = contract(scaled), []
        for cast in (round_to_nearest, dither):
            kernels.dither = cast
            survived = effective_weight(weight, [Cut(MPO, tuple(scaled))], torch.bfloat16).float() - weight.float()
            survivors.append(((survived * update).sum() / update.square().sum()).item())
        print(f"{share:<14g} {survivors[0]:9.1%} {survivors[1]:9.1%}")


if __name__ == "__main__":
    main()
