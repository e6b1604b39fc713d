"""A thousand small adapters: their size on disk, and the time to load one into a running model, beside a LoRA.

    python benchmarks/many_adapters.py [--count 1000] [--rounds 5]

The base has LLaMA-2-7B's 32 attention blocks (hidden size 4096, 32 heads), in bfloat16; its MLPs and vocabulary, which
no adapter touches here, are cut small. Rank 4 on query and value; "LoTR, cores" trains what is between frozen frames,
which every adapter's file holds, or which are kept once beside them. Takes 5 GB of memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from tensorpeft import LortaConfig, LotrConfig, save_frames

TARGETS = ["q_proj", "v_proj"]
CORES, KEPT = "LoTR, cores", "LoTR, cores, frames once"
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "LoRTA": lambda: LortaConfig(r=4, target_modules=TARGETS),
    "LoTR": lambda: LotrConfig(r=4, target_modules=TARGETS),
    CORES: lambda: LotrConfig(r=4, alpha=4, train="cores", target_modules=TARGETS),
    KEPT: lambda: LotrConfig(r=4, alpha=4, train="cores", target_modules=TARGETS),
}
MANY = ("LoRTA", CORES, KEPT)


def build_base() -> LlamaForCausalLM:
    """Zeros: only shapes matter."""
    config = LlamaConfig(intermediate_size=64, vocab_size=64, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.to_empty(device="cpu").to(torch.bfloat16)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def loading_time(model: PeftModel, folder: Path, rounds: int) -> float:
    """Median seconds to load the adapter of a folder beside those that are there."""
    times = []
    for k in range(rounds):
        start = time.perf_counter()
        model.load_adapter(str(folder), f"loaded{k}")
        times.append(time.perf_counter() - start)
        model.delete_adapter(f"loaded{k}")
    return median(times)


def main() -> None:
    """Print both figures for both methods."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    base = build_base()
    seconds = {}
    print(f"{'':24s} {'parameters':>12s} {'one adapter':>14s} {'loading, s':>11s}")
    frames = tempfile.TemporaryDirectory()
    for name, make in METHODS.items():
        model = get_peft_model(base, make())
        if name == KEPT:
            save_frames(model, frames.name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            seconds[name] = loading_time(model, Path(folder), arguments.rounds)
            row = f"{model.get_nb_trainable_parameters()[0]:12,d} {size_of(Path(folder)) / 1e3:11.1f} kB"
            print(f"{name:24s} {row} {seconds[name]:11.3f}", flush=True)
        if name in MANY and arguments.count:
            with tempfile.TemporaryDirectory() as folder:
                for k in track(range(arguments.count), f"Saving {arguments.count} adapters"):
                    with torch.no_grad():
                        for parameter in model.parameters():
                            if parameter.requires_grad:
                                parameter.normal_()
                    model.save_pretrained(str(Path(folder) / f"adapter-{k}"))
                total = size_of(Path(folder))
            total += size_of(Path(frames.name))  # empty before they are kept
            print(f"{arguments.count} such adapters with their configurations and cards: {total / 1e6:.1f} MB on disk")
        base = model.unload()
    frames.cleanup()
    for name in MANY:
        print(f"loading a {name} takes {seconds[name] / seconds['LoRA']:.2f} x loading a LoRA")


if __name__ == "__main__":
    main()
