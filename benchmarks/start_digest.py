"""Could DoTA's start be recomputed from the weight instead of saved? The bits of it, by threads and instructions.

    python benchmarks/start_digest.py

A Gaussian weight of each shape, the same bits everywhere, is decomposed (five cores, bonds of at most 16, float32) in a
process of its own for every setting: numbers of threads, the instructions that torch, MKL and oneDNN may use, which is
what another processor has, and MKL's reproducible mode. Each cell is "=" where all cores have the bits of the first
line's, else the largest relative difference of a core, and of the matrix that they make, |f(T) - f(T')| / |f(T)|.
`--save FILE` keeps the cores, `--beside FILE` compares with those of another machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tensorpeft.modes import factor_modes
from tensorpeft.networks.mpo import contract, decompose

SHAPES = ((64, 64), (172, 64), (384, 384), (1536, 384), (576, 1536), (2048, 2048))
THREADS = "OMP_NUM_THREADS"
SETTINGS: list[Mapping[str, str]] = [
    {THREADS: "1"},
    {THREADS: "1"},
    {THREADS: "2"},
    {THREADS: "4"},
    {THREADS: "1", "ATEN_CPU_CAPABILITY": "default"},
    {THREADS: "1", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},  # an Intel processor's only
    {THREADS: "1", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {THREADS: "1", "MKL_CBWR": "COMPATIBLE"},
    {THREADS: "2", "MKL_CBWR": "COMPATIBLE"},
]


def write_cores(file: Path) -> None:
    """The cores of every shape's weight, as this process computes them."""
    cores = dict[str, Tensor]()
    for out, in_ in SHAPES:
        # numpy's are computed one by one, without vector instructions.
        weight = np.random.default_rng(out * in_).standard_normal((out, in_)).astype(np.float32)
        modes = [factor_modes(size, 5) for size in (out, in_)]
        for k, core in enumerate(decompose(torch.from_numpy(weight), *modes, 16)):
            cores[f"{out} × {in_}.{k}"] = core.contiguous()
    save_file(cores, file)


def cores_of(tensors: Mapping[str, Tensor], shape: str) -> list[Tensor]:
    """Of one weight, in order."""
    return [tensors[key] for key in sorted(tensors) if key.rpartition(".")[0] == shape]


def compare(first: list[Tensor], other: list[Tensor]) -> str:
    """A cell of the table."""
    if all(torch.equal(a, b) for a, b in zip(first, other, strict=True)):
        return "="
    of_cores = max(((a - b).norm() / a.norm()).item() for a, b in zip(first, other))
    whole, matrix = contract(first), contract(other)
    return f"{of_cores:.0e}, {((whole - matrix).norm() / whole.norm()).item():.0e}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, metavar="FILE")
    parser.add_argument("--beside", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write is not None:
        write_cores(arguments.write)
        return
    shapes = [f"{out} × {in_}" for out, in_ in SHAPES]
    print(f"| setting | {' | '.join(shapes)} |")
    print(f"| --- |{' --- |' * len(shapes)}")
    first = None if arguments.beside is None else load_file(arguments.beside)
    with TemporaryDirectory() as folder:
        for k, setting in enumerate(SETTINGS):
            file = Path(folder, str(k))
            command = [sys.executable, __file__, "--write", str(file)]
            kept = {name: value for name, value in os.environ.items() if name not in set().union(*SETTINGS)}
            subprocess.run(command, check=True, env={**kept, **setting})
            found = load_file(file)
            if arguments.save is not None and k == 0:
                save_file(found, arguments.save)
            first = first or found
            cells = [compare(cores_of(first, shape), cores_of(found, shape)) for shape in shapes]
            name = ", ".join(f"{key}={value}" for key, value in setting.items() if key != THREADS)
            threads = f"{setting[THREADS]} thread{'s' if setting[THREADS] != '1' else ''}"
            print(f"| {threads}{f', `{name}`' if name else ''} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
